"""The captions that a sample is trained with, if there may be several.

There are several if a row lists several captions (`caption_lists`), if the tags of a caption are
put in several orders (`shuffle_tags`), or if the caption is sometimes replaced by the empty one
(`caption_dropout_rate`). Then every stage that depends on the caption, directly or through a stage
it needs, is encoded once for each caption.

In the manifest, the key columns of these stages and the caption's own column then hold lists. All
lists of a row have the same length and order: the captions as the table lists them, the tag orders
of a caption next to each other, the empty caption last.
"""

from dataclasses import dataclass

import polars as pl

from diffsynth_dagster.cache.keys import all_reads
from diffsynth_dagster.cache.tag_orders import TagOrders
from diffsynth_dagster.config.parameters import TrainingConfig
from diffsynth_dagster.families.contract import Family, Stage


@dataclass(frozen=True)
class Captions:
    """Which captions a row is encoded with, and what depends on them.

    Attributes:
        column: the column of the caption.
        stages: names of the stages that depend on the caption.
        empty: whether the empty caption is added as the last one.
        orders: the orders of a caption's tags; None keeps captions as they are written.
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
            rows: rows of a checked table.
            column: the name of the caption's column in `rows`.
        """
        is_list = isinstance(rows.schema[column], pl.List)
        captions = pl.col(column) if is_list else pl.concat_list(column)
        if self.orders is not None:
            captions = captions.map_batches(
                self.orders.of_lists, return_dtype=pl.List(pl.String), is_elementwise=True
            )
        # Last, so that the index of every other caption is the same with and without dropout.
        empty = pl.lit([""], dtype=pl.List(pl.String))
        return (pl.concat_list(captions, empty) if self.empty else captions).alias(column)

    def with_told(self, rows: pl.DataFrame, column: str) -> pl.DataFrame:
        """The rows with one caption each: the one whose index is in the column `caption`."""
        texts = rows.with_columns(self.of_rows(rows, column))
        return texts.with_columns(pl.col(column).list.get(pl.col("caption")))


def captions_of(config: TrainingConfig, family: Family) -> Captions | None:
    """How the rows of a training are captioned; None if every row always has its one caption."""
    caption = family.caption
    several = config.caption_lists or config.caption_dropout_rate > 0.0 or config.shuffle_tags
    if caption is None or not several:
        return None
    # `all_reads` follows `needs`: a stage may see the caption through another stage's output.
    stages = [s.name for s in family.stages if caption in all_reads(s, family)]
    orders = None
    if config.shuffle_tags:
        orders = TagOrders(config.tag_orders, config.keep_tags, config.caption_prefix)
    return Captions(caption.column, frozenset(stages), config.caption_dropout_rate > 0.0, orders)
