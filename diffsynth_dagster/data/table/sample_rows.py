"""Check the table that `sample_prompts` names: sample pictures are generated from its rows.

It is read and checked like the metadata, but it need not have the column of what is trained on. The
size of a sample is the first of these that is known:

1. `height` and `width`;
2. the trained size of the row's file in the column of what is trained on;
3. the trained size of the first file that the row names.

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
from diffsynth_dagster.data.columns import Columns, Input
from diffsynth_dagster.data.geometry import ClipRule, FrameRule, clip_rule, size_rule
from diffsynth_dagster.data.table.files import FileCheck, TrainedShape
from diffsynth_dagster.data.table.read import read_table
from diffsynth_dagster.data.table.shapes import with_same_size, with_shape
from diffsynth_dagster.data.table.validate import CheckedTable
from diffsynth_dagster.data.table.values import check_structure, require_columns
from diffsynth_dagster.errors import MetadataError
from diffsynth_dagster.facts import FactCache

_SAMPLE = Input("\x00sample", "video")
"""Stands for the generated sample, in place of the file that decides the size of a row."""


def check_sample_rows(
    config: TrainingConfig, columns: Columns, trained: Input | None, fact_cache: FactCache
) -> CheckedTable:
    """Check every row of the table that `sample_prompts` names, and every file that it names.

    Args:
        columns: the columns that samples are generated from.
        trained: the column of what is trained on, if it is not among `columns`.

    Returns:
        The table, with all rows accepted. `width`, `height` and `frames` are the size of the
        sample; `width` and `height` are 0 if nothing determines them.

    Raises:
        MetadataError: the table cannot be read, lacks a column, or has a row that cannot be used.
    """
    assert config.sample_table is not None
    source = Path(config.sample_table)
    geometry, reader = columns.geometry, columns.reader
    clip = clip_rule(config.num_frames, config.frame_rate, geometry, reader)
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
    frame = _with_sizes(frame, config, columns, _size_giver(given, trained), clip)
    _require_every_row(frame, str(source))
    return CheckedTable(
        frame.lazy(),
        str(source),
        settled_by_checking(config),
        named_data(config),
        columns.described,
    )


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
    sides = (config.width or 0, config.height or 0)
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
    frame = with_shape(frame, columns.files or (_SAMPLE,))
    return frame.with_columns(
        pl.col(target).list.get(0).fill_null(0).alias("width"),
        pl.col(target).list.get(1).fill_null(0).alias("height"),
        pl.col(frames).alias("frames"),
    )


@contextmanager
def _naming_the_parameter() -> Generator[None]:
    """Change messages about `dataset_metadata_path` to name `sample_prompts` instead."""
    try:
        yield
    except MetadataError as error:
        where = (error.where or "").replace("dataset_metadata_path", "sample_prompts")
        raise MetadataError(error.what, where=where, do=error.do) from error


def _require_every_row(frame: pl.DataFrame, source: str) -> None:
    """Refuse a table with a rejected row. Raises `MetadataError`."""
    rejected = frame.filter(pl.col("status") != "ok").select("row", "status", "message")
    if rejected.height:
        first = [f"row {row}: {why} ({status})" for row, status, why in rejected.head(5).rows()]
        raise MetadataError(
            f"{rejected.height} of {frame.height} rows cannot be used: " + "; ".join(first),
            where=f"sample_prompts = {source}",
            do="mend or remove these rows",
        )
