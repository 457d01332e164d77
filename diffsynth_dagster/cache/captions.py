"""The captions of a row: one, or a list of them, each in several orders of its tags where these are
shuffled, and the empty one where captions are dropped.

Where a row has more than one, what depends on the caption is there for each. The manifest then has
lists in the columns of the stages that read it, themselves or upstream, and of the caption itself,
all of one length in a row: a text for each caption in the order of the table, its orders next to each
other, the empty one last.
"""

from dataclasses import dataclass

import polars as pl

from diffsynth_dagster.cache.keys import all_reads
from diffsynth_dagster.cache.tag_orders import TagOrders
from diffsynth_dagster.config.parameters import TrainingConfig
from diffsynth_dagster.families.contract import Family, Stage


@dataclass(frozen=True)
class Captions:
    """How many captions rows have.

    Attributes:
        column: the column of the caption.
        stages: names of the stages that depend on it.
        empty: whether the empty caption stands behind the others.
        orders: how the tags of a caption are ordered; None for as they are written.
    """

    column: str
    stages: frozenset[str]
    empty: bool
    orders: TagOrders | None = None

    def told(self, stage: Stage) -> bool:
        """Whether a stage depends on the caption."""
        return stage.name in self.stages

    def of_rows(self, rows: pl.DataFrame, column: str) -> pl.Expr:
        """The captions of each row as a list of texts.

        Args:
            rows: of a checked table.
            column: what the column of the caption is called there.
        """
        listed = isinstance(rows.schema[column], pl.List)
        own = pl.col(column) if listed else pl.concat_list(column)
        if self.orders is not None:
            own = own.map_batches(
                self.orders.of_lists, return_dtype=pl.List(pl.String), is_elementwise=True
            )
        empty = pl.lit([""], dtype=pl.List(pl.String))
        return (pl.concat_list(own, empty) if self.empty else own).alias(column)

    def with_told(self, rows: pl.DataFrame, column: str) -> pl.DataFrame:
        """The rows with the caption that `caption` counts, in the place of all."""
        texts = rows.with_columns(self.of_rows(rows, column))
        return texts.with_columns(pl.col(column).list.get(pl.col("caption")))


def captions_of(config: TrainingConfig, family: Family) -> Captions | None:
    """The captions of the rows of a training; None where each has one and is told that always."""
    caption = family.caption
    several = config.caption_lists or config.caption_dropout_rate > 0.0 or config.shuffle_tags
    if caption is None or not several:
        return None
    stages = [s.name for s in family.stages if caption in all_reads(s, family)]
    orders = None
    if config.shuffle_tags:
        orders = TagOrders(config.tag_orders, config.keep_tags, config.caption_prefix)
    return Captions(caption.column, frozenset(stages), config.caption_dropout_rate > 0.0, orders)
