"""Find captions that are longer than the text encoder reads.

The rest of such a caption is cut off when it is encoded, so the model never sees it. Counting needs
the tokenizer: it is done before samples are encoded, and when the table is checked if the model's
files have been downloaded already.
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
"""Captions per call of the tokenizer, which returns their tokens as Python lists."""
_SHOWN_ROWS = 20


@dataclass(frozen=True)
class LongCaptions:
    """How many captions are longer than the text encoder reads, and where they are.

    Attributes:
        count: number of rows with such captions.
        longest: tokens of the longest caption.
        most: tokens that the text encoder reads.
        rows: (row of the table, tokens of its longest caption) of the first such rows.
        advice: what the user can do so that more is read.
    """

    count: int = 0
    longest: int = 0
    most: int = 0
    rows: tuple[tuple[int, int], ...] = ()
    advice: str = ""

    @property
    def warning(self) -> str | None:
        """`said`, and the file that lists them; None if there are none."""
        said = self.said
        return None if said is None else f"{said}. {FILE_NAME} in the run folder lists them"

    @property
    def said(self) -> str | None:
        """A sentence about the long captions; None if there are none."""
        if not self.count:
            return None
        first = self.rows[0][0]
        which = (
            f"the caption of row {first} is"
            if self.count == 1
            else f"the captions of {self.count} rows, the first is {first}, are"
        )
        return (
            f"{which} longer than the {self.most} tokens that the text encoder reads (the longest "
            f"has {self.longest}): what lies behind is cut off; {self.advice or 'shorten them'}"
        )


def caption_limit(family: Family) -> TokenLimit | None:
    """The limit of the stage that reads the caption; None if it reads captions of any length."""
    limits = (stage.limit for stage in family.stages if family.caption in stage.reads)
    return next(filter(None, limits), None)


def count_long_captions(
    model: ResolvedModel, table: CheckedTable, folder: Path, fact_cache: FactCache
) -> LongCaptions:
    """Count the long captions of a checked table, and list them in a run folder.

    A count of the same captions with the same tokenizer is read from the run folder instead.

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
    # All that the count depends on. A table of millions of rows is counted once, not at each start.
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
    """The same as `count_long_captions`, without reading or writing the list in a run folder.

    Raises:
        WeightsError: the tokenizer cannot be loaded.
    """
    limit = caption_limit(model.family)
    suspects = None if limit is None else _suspects(table, model.family, limit)
    if limit is None or suspects is None:
        return LongCaptions()
    return _described(_count(suspects, limit, load_tokenizer(model, limit.tokenizer)), limit)


def count_if_there(
    config: TrainingConfig, table: CheckedTable, fact_cache: FactCache
) -> LongCaptions | None:
    """The same as `count_long_captions`; None if the model's files have to be downloaded first."""
    hub = ModelHub(ModelHub.from_environment().base_path, skip_download=True)
    try:
        model = find_model(config, hub)
        return count_long_captions(model, table, Path(config.output_path), fact_cache)
    except UserError:
        return None  # a problem of the model is reported by the step that loads it


def read_long_captions(folder: Path, known_by: str | None = None) -> LongCaptions | None:
    """Read the count that `count_long_captions` wrote into a run folder; None if there is no such
    count.

    Args:
        known_by: digest of the captions and the tokenizer that the count has to be of; None accepts
            any count.
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
        return None  # the file is damaged or of another version: captions are counted again


def _suspects(table: CheckedTable, family: Family, limit: TokenLimit) -> pl.DataFrame | None:
    """`row` and `caption` of the captions that may be too long, judged by their bytes; or None."""
    assert family.caption is not None
    captions = table.accepted.select("row", pl.col(family.caption.column).alias("caption"))
    if isinstance(captions.collect_schema()["caption"], pl.List):
        captions = captions.explode("caption")
    # A token covers at least one byte, so short captions need no tokenizer: most of a table. But
    # tokenizers normalise text that is not ASCII, which may make it longer.
    size, always = pl.col("caption").str.len_bytes(), limit.always_read
    is_ascii = size == pl.col("caption").str.len_chars()
    is_short = pl.when(is_ascii).then(size <= always).otherwise(size * MOST_BYTES_OF_ONE <= always)
    suspects = captions.filter(~is_short).collect(engine="streaming")
    return suspects if suspects.height else None


def _count(suspects: pl.DataFrame, limit: TokenLimit, tokenizer: Any) -> pl.DataFrame:
    """Count tokens.

    Returns:
        `row` and `tokens` (of its longest caption) of the rows with a caption that is too long, in
        the order of the table.
    """
    texts = suspects["caption"].unique(maintain_order=True)  # each text is counted once
    counts: list[int] = []
    for part in texts.to_frame().iter_slices(_AT_ONCE):
        counts += limit.count(tokenizer, part["caption"].to_list())
    tokens = pl.DataFrame({"caption": texts, "tokens": pl.Series(counts, dtype=pl.UInt32)})
    long = tokens.filter(pl.col("tokens") > limit.most)
    longest = suspects.join(long, on="caption").group_by("row").agg(pl.col("tokens").max())
    return longest.sort("row")


def _described(rows: pl.DataFrame, limit: TokenLimit) -> LongCaptions:
    longest = int(rows["tokens"].max() or 0)  # pyright: ignore[reportArgumentType]  (of integers)
    first = tuple((int(row), int(tokens)) for row, tokens in rows.head(_SHOWN_ROWS).iter_rows())
    return LongCaptions(rows.height, longest, limit.most, first, limit.advice)
