"""The table that `sample_prompts` names: rows that samples are made of.

It is read and checked as the metadata is. What is trained on need not be named: no row lacks a size
without it. A sample has the size that `height` and `width` give; else that of its row's file of what
is trained on, where the table has that column; else that of the first file that the row names. A
clip is as long as `num_frames` says: one that ends before stands still, and so does a picture.
"""

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import polars as pl

from diffsynth_dagster.config.effect import settled_by_checking
from diffsynth_dagster.config.parameters import TrainingConfig
from diffsynth_dagster.config.settled import named_data
from diffsynth_dagster.data.columns import Columns, Input
from diffsynth_dagster.data.geometry import ClipRule, FrameRule, clip_rule, size_rule
from diffsynth_dagster.data.table.check import CheckedTable
from diffsynth_dagster.data.table.files import FileCheck, TrainedShape
from diffsynth_dagster.data.table.read import read_table
from diffsynth_dagster.data.table.shapes import with_same_size, with_shape
from diffsynth_dagster.data.table.values import check_structure, require_columns
from diffsynth_dagster.errors import MetadataError
from diffsynth_dagster.facts import FactCache

_SAMPLE = Input("\x00sample", "video")
"""Stands for what is made, in the place of the file that decides the size of a row."""


def check_sample_rows(
    config: TrainingConfig, columns: Columns, trained: Input | None, fact_cache: FactCache
) -> CheckedTable:
    """Check every row of the table that `sample_prompts` names, and every file that it names.

    Args:
        columns: what samples are made of.
        trained: the column of what is trained on, if that is not among them.

    Returns:
        The table, all of its rows accepted. `width`, `height` and `frames` are those of the sample;
        the sides are 0 where nothing says them.

    Raises:
        MetadataError: the table cannot be read, lacks a column, or has a row that cannot be used.
    """
    assert config.sample_table is not None
    source = Path(config.sample_table)
    geometry, reader = columns.geometry, columns.reader
    clip = clip_rule(config.num_frames, config.frame_rate, geometry, reader)
    size = size_rule(config.height, config.width, config.max_pixels, geometry, config.bucket_step)
    own = config.model_copy(update={"dataset_base_path": str(source.parent)})
    inputs = [*columns.named]
    asked = [*inputs] if trained is None or config.height is not None else [*inputs, trained]
    with _naming_the_parameter():
        table = read_table(source, config.metadata_encoding, asked)
        require_columns(table, inputs, str(source), reader)
        given = [i for i in asked if i in inputs or i.column in table.columns]
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
    """The rule that takes clips of any length: what they lack of a sample's length stands still."""
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
    """The frame with the sizes and lengths of the samples, and of the files that are read at them."""
    target, frames = f"{_SAMPLE.column}:target", f"{_SAMPLE.column}:frames"
    sides = (config.width or 0, config.height or 0)
    size = pl.concat_list(pl.lit(side, pl.Int64) for side in sides)
    if config.height is None and giver is not None:
        own = pl.col(f"{giver.column}:target")
        size = own.list.first() if giver.many else own
    length = pl.lit(1 if clip is None else clip.num_frames, pl.Int64)
    frame = frame.with_columns(size.alias(target), length.alias(frames))
    for item in columns.files:
        if item.kind == "video":
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
    """Let messages about the table name the parameter that it comes from."""
    try:
        yield
    except MetadataError as error:
        where = (error.where or "").replace("dataset_metadata_path", "sample_prompts")
        raise MetadataError(error.what, where=where, do=error.do) from error


def _require_every_row(frame: pl.DataFrame, source: str) -> None:
    """Refuse a table with a row that cannot be used. Raises `MetadataError`."""
    rejected = frame.filter(pl.col("status") != "ok").select("row", "status", "message")
    if rejected.height:
        first = [f"row {row}: {why} ({status})" for row, status, why in rejected.head(5).rows()]
        raise MetadataError(
            f"{rejected.height} of {frame.height} rows cannot be used: " + "; ".join(first),
            where=f"sample_prompts = {source}",
            do="mend or remove these rows",
        )
