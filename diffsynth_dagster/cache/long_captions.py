"""The captions that are longer than the text encoder reads.

What lies behind is cut off when they are encoded, so that the model never sees it. They are counted
where the tokenizer is known: before samples are encoded, and when the table is checked if the model's
files are there already.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import polars as pl

from diffsynth_dagster.config.parameters import TrainingConfig
from diffsynth_dagster.data.digests import digest_rows
from diffsynth_dagster.data.scan import read_notes
from diffsynth_dagster.data.table.validate import CheckedTable
from diffsynth_dagster.errors import UserError
from diffsynth_dagster.facts import FactCache, digest_of
from diffsynth_dagster.families.contract import Family
from diffsynth_dagster.families.limits import MOST_BYTES_OF_ONE, TokenLimit
from diffsynth_dagster.files import write_whole
from diffsynth_dagster.weights.hub import ModelHub
from diffsynth_dagster.weights.identify import find_model
from diffsynth_dagster.weights.models import component_digest, load_tokenizer
from diffsynth_dagster.weights.resolved import ResolvedModel

FILE_NAME = "long_captions.parquet"
_NOTES = "diffsynth_dagster"
_AT_ONCE = 1 << 13
"""Captions that are counted together: their tokens lie in Python objects meanwhile."""
_SHOWN_ROWS = 20


@dataclass(frozen=True)
class LongCaptions:
    """What is known of captions that are longer than the text encoder reads.

    Attributes:
        count: rows with such captions.
        longest: tokens of the longest caption.
        most: tokens that are read.
        rows: number of the row in the table and tokens of its longest caption, of the first such rows.
        advice: how more is read.
    """

    count: int = 0
    longest: int = 0
    most: int = 0
    rows: tuple[tuple[int, int], ...] = ()
    advice: str = ""

    @property
    def warning(self) -> str | None:
        """What is said of them, and where they are listed, if there are any."""
        said = self.said
        return None if said is None else f"{said}. {FILE_NAME} in the run folder lists them"

    @property
    def said(self) -> str | None:
        """A sentence about them, if there are any."""
        if not self.count:
            return None
        first = self.rows[0][0]
        which = (
            f"the caption of row {first} is"
            if self.count == 1
            else f"the captions of {self.count} rows, the first is {first}, are"
        )
        return (
            f"{which} longer than the {self.most} tokens that the text encoder reads (the longest has "
            f"{self.longest}): what lies behind is cut off; {self.advice or 'shorten them'}"
        )


def caption_limit(family: Family) -> TokenLimit | None:
    """How much is read of the caption, if not all."""
    limits = (stage.limit for stage in family.stages if family.caption in stage.reads)
    return next(filter(None, limits), None)


def count_long_captions(
    model: ResolvedModel, table: CheckedTable, folder: Path, fact_cache: FactCache
) -> LongCaptions:
    """Count the long captions of a checked table, and list them in its run folder. What was counted
    before, with the same tokenizer, is not counted again.

    Raises:
        WeightsError: the tokenizer cannot be loaded.
        OutputError: the folder cannot be written.
    """
    limit = caption_limit(model.family)
    suspects = None if limit is None else _suspects(table, model.family, limit)
    if limit is None or suspects is None:
        (folder / FILE_NAME).unlink(missing_ok=True)
        return LongCaptions()
    tokenizer = component_digest(model, limit.tokenizer, fact_cache)
    known_by = digest_of([digest_rows(suspects.lazy()), tokenizer, limit.most, limit.before])
    known = read_long_captions(folder, known_by)
    if known is not None:
        return known
    rows = _count(suspects, limit, load_tokenizer(model, limit.tokenizer))
    counted = _described(rows, limit)
    notes = {_NOTES: json.dumps({"known_by": known_by, **asdict(counted)})}
    write_whole(folder / FILE_NAME, lambda staged: rows.write_parquet(staged, metadata=notes))
    return counted


def long_captions_of(model: ResolvedModel, table: CheckedTable) -> LongCaptions:
    """Count the long captions of a checked table; nothing is written. Raises `WeightsError`: see
    `count_long_captions`."""
    limit = caption_limit(model.family)
    suspects = None if limit is None else _suspects(table, model.family, limit)
    if limit is None or suspects is None:
        return LongCaptions()
    return _described(_count(suspects, limit, load_tokenizer(model, limit.tokenizer)), limit)


def count_if_there(
    config: TrainingConfig, table: CheckedTable, fact_cache: FactCache
) -> LongCaptions | None:
    """The same for the table of a config, if the model's files are there without a download."""
    hub = ModelHub(ModelHub.from_environment().base_path, skip_download=True)
    try:
        found = find_model(config, hub)
        return count_long_captions(found, table, Path(config.output_path), fact_cache)
    except UserError:
        return None  # what is wrong with the model is said where it is loaded


def read_long_captions(folder: Path, known_by: str | None = None) -> LongCaptions | None:
    """What was counted in a run folder; None where nothing was, or only for another table or tokenizer.

    Args:
        known_by: digest of what it has to be counted of; None takes any.
    """
    path = folder / FILE_NAME
    if not path.is_file():
        return None
    try:
        known = json.loads(read_notes(path)[_NOTES])
        if known.pop("known_by") != known_by and known_by is not None:
            return None
        known["rows"] = tuple((row, tokens) for row, tokens in known["rows"])
        return LongCaptions(**known)
    except (OSError, pl.exceptions.PolarsError, ValueError, TypeError, KeyError):
        return None  # it is counted again


def _suspects(table: CheckedTable, family: Family, limit: TokenLimit) -> pl.DataFrame | None:
    """`row` and `caption` of those that may be too long, by their bytes; None where there are none."""
    assert family.caption is not None
    captions = table.accepted.select("row", pl.col(family.caption.column).alias("caption"))
    if isinstance(captions.collect_schema()["caption"], pl.List):
        captions = captions.explode("caption")
    size, always = pl.col("caption").str.len_bytes(), limit.always_read
    is_ascii = size == pl.col("caption").str.len_chars()
    few = pl.when(is_ascii).then(size <= always).otherwise(size * MOST_BYTES_OF_ONE <= always)
    suspects = captions.filter(~few).collect(engine="streaming")
    return suspects if suspects.height else None


def _count(suspects: pl.DataFrame, limit: TokenLimit, tokenizer: Any) -> pl.DataFrame:
    """`row` and `tokens` (of its longest caption) of the rows with a caption that is too long. Each text
    is counted once."""
    texts = suspects["caption"].unique(maintain_order=True)
    counts: list[int] = []
    for part in texts.to_frame().iter_slices(_AT_ONCE):
        counts += limit.count(tokenizer, part["caption"].to_list())
    tokens = pl.DataFrame({"caption": texts, "tokens": pl.Series(counts, dtype=pl.UInt32)})
    long = tokens.filter(pl.col("tokens") > limit.most)
    found = suspects.join(long, on="caption").group_by("row").agg(pl.col("tokens").max())
    return found.sort("row")


def _described(rows: pl.DataFrame, limit: TokenLimit) -> LongCaptions:
    longest = int(rows["tokens"].max() or 0)  # pyright: ignore[reportArgumentType]  (of integers)
    first = tuple((int(row), int(tokens)) for row, tokens in rows.head(_SHOWN_ROWS).iter_rows())
    return LongCaptions(rows.height, longest, limit.most, first, limit.advice)
