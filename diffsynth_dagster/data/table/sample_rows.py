"""Check the rows that samples are made from: the prompts of `sample_prompts`, or `sample_table`.

The table is read and checked like the metadata, but it need not have the column of what is trained
on. The size of a sample is the first of these that is known:

1. `height` and `width`;
2. the trained size of the row's file in the column of what is trained on;
3. the trained size of the first file that the row names;
4. the usual size of the family.

A clip has `num_frames` frames. The last frame of shorter clips is repeated, and so are pictures.
"""

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import polars as pl

from diffsynth_dagster.config.affects import settled_by_checking
from diffsynth_dagster.config.inherited import named_data
from diffsynth_dagster.config.parameters import TrainingConfig
from diffsynth_dagster.data.columns import CAPTION, Columns, Input
from diffsynth_dagster.data.geometry import ClipRule, FrameRule, clip_rule, size_rule
from diffsynth_dagster.data.table.files import FileCheck, TrainedShape
from diffsynth_dagster.data.table.read import read_table
from diffsynth_dagster.data.table.shapes import with_same_size, with_shape
from diffsynth_dagster.data.table.validate import CheckedTable
from diffsynth_dagster.data.table.values import STATUS, check_structure, require_columns
from diffsynth_dagster.errors import MetadataError
from diffsynth_dagster.facts import FactCache

_SAMPLE = Input("\x00sample", "video")
"""Stands for the generated sample, in place of the file that decides the size of a row."""


def check_sample_rows(
    config: TrainingConfig, columns: Columns, trained: Input | None, fact_cache: FactCache
) -> CheckedTable:
    """Check every row that a sample is made from, and every file that it names.

    Args:
        columns: the columns that samples are generated from.
        trained: the column of what is trained on, if it is not among `columns`.

    Returns:
        The table, with all rows accepted. `width`, `height` and `frames` are the size of the
        sample.

    Raises:
        MetadataError: the table cannot be read, lacks a column, or has a row that cannot be used.
    """
    clip = clip_rule(config.num_frames, config.frame_rate, columns.geometry, columns.reader)
    if config.sample_table is None:
        frame, given = _of_prompts(config.sample_prompts), []
    else:
        frame, given = _of_table(config, columns, trained, clip, fact_cache)
    frame = _with_sizes(frame, config, columns, _size_giver(given, trained), clip)
    if config.sample_table is not None:
        _require_every_row(frame, config.sample_table)
    return CheckedTable(
        frame.lazy(),
        config.sample_table or "sample_prompts",
        settled_by_checking(config),
        named_data(config),
        columns.described,
    )


def _of_prompts(prompts: Sequence[str]) -> pl.DataFrame:
    """A row for each prompt, with the columns of `check_structure`."""
    frame = pl.DataFrame({CAPTION: prompts}, schema={CAPTION: pl.String})
    return frame.select(
        pl.int_range(1, pl.len() + 1, dtype=pl.UInt32).alias("row"),
        pl.lit("ok", STATUS).alias("status"),
        pl.lit("").alias("message"),
        CAPTION,
    )


def _of_table(
    config: TrainingConfig,
    columns: Columns,
    trained: Input | None,
    clip: ClipRule | None,
    fact_cache: FactCache,
) -> tuple[pl.DataFrame, list[Input]]:
    """The rows of `sample_table` with the facts of their files, and the columns that it has."""
    assert config.sample_table is not None
    source = Path(config.sample_table)
    geometry, reader = columns.geometry, columns.reader
    size = size_rule(config.height, config.width, config.max_pixels, geometry, config.bucket_step)
    # Paths in this table are relative to the folder of the table, not to the data set.
    own = config.model_copy(update={"dataset_base_path": str(source.parent)})
    inputs = [*columns.named]
    # With a fixed size, the file of the trained column is not needed.
    possible = [*inputs] if trained is None or config.height is not None else [*inputs, trained]
    with _naming_the_parameter():
        table = read_table(source, config.metadata_encoding, possible)
        require_columns(table, inputs, str(source), reader)
        given = [i for i in possible if i in inputs or i.column in table.columns]
        frame = check_structure(table, given, str(source))
    shape = TrainedShape(size, None if clip is None else _with_stills(clip), config.background)
    with FileCheck(own, shape, fact_cache, lambda count: None) as files:
        for item in (i for i in given if i.is_file):
            frame = files.check(frame, item)
    return frame, given


def _with_stills(clip: ClipRule) -> ClipRule:
    """A rule that takes clips of any length. The last frame of shorter ones will be repeated."""
    return replace(clip, rule=FrameRule(1, 0))


def _size_giver(given: Sequence[Input], trained: Input | None) -> Input | None:
    """The column whose file decides the size of a sample."""
    files = [i for i in given if i.is_file]
    return trained if trained in files else next(iter(files), None)


def _with_sizes(
    frame: pl.DataFrame,
    config: TrainingConfig,
    columns: Columns,
    giver: Input | None,
    clip: ClipRule | None,
) -> pl.DataFrame:
    """Add the sizes and lengths of the samples, and of the files that are read at these."""
    target, frames = f"{_SAMPLE.column}:target", f"{_SAMPLE.column}:frames"
    usual = columns.geometry.sample_size
    sides = (config.width or usual[0], config.height or usual[1])
    size = pl.concat_list(pl.lit(side, pl.Int64) for side in sides)
    if config.height is None and giver is not None:
        targets = pl.col(f"{giver.column}:target")
        size = targets.list.first() if giver.many else targets
    length = pl.lit(1 if clip is None else clip.num_frames, pl.Int64)
    frame = frame.with_columns(size.alias(target), length.alias(frames))
    for item in columns.files:
        if item.kind == "video":  # read as many frames as the sample has
            column = f"{item.column}:frames"
            count = pl.col(column).list.len()
            as_long = pl.col(frames).repeat_by(count) if item.many else pl.col(frames)
            frame = frame.with_columns(as_long.alias(column))
        if item.same_size:
            frame = with_same_size(frame, _SAMPLE, item, columns.geometry.side_factor)
    # The sample first: those that are made at once have its size, too.
    frame = with_shape(frame, (_SAMPLE, *columns.files))
    for item in (i for i in columns.inputs if i.kind == "sizes"):
        # Nothing is resized or cropped: the original size is that of the sample.
        size = [pl.col("height"), pl.col("width")]
        parts = [*size, pl.lit(0), pl.lit(0), *size]
        frame = frame.with_columns(pl.concat_str(parts, separator=",").alias(item.column))
    return frame


@contextmanager
def _naming_the_parameter() -> Generator[None]:
    """Change messages about `dataset_metadata_path` to name `sample_table` instead."""
    try:
        yield
    except MetadataError as error:
        where = (error.where or "").replace("dataset_metadata_path", "sample_table")
        raise MetadataError(error.what, where=where, do=error.do) from error


def _require_every_row(frame: pl.DataFrame, source: str) -> None:
    """Refuse a table with a rejected row. Raises `MetadataError`."""
    rejected = frame.filter(pl.col("status") != "ok").select("row", "status", "message")
    if rejected.height:
        first = [f"row {row}: {why} ({status})" for row, status, why in rejected.head(5).rows()]
        raise MetadataError(
            f"{rejected.height} of {frame.height} rows cannot be used: " + "; ".join(first),
            where=f"sample_table = {source}",
            do="mend or remove these rows",
        )
