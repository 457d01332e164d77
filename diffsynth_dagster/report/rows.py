"""What the report says of the data set: its rows by status, its sizes, and the hardest rows."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import polars as pl

from diffsynth_dagster.data.columns import CAPTION
from diffsynth_dagster.data.media.image import read_image
from diffsynth_dagster.data.media.video import read_frames
from diffsynth_dagster.data.scan import read_parquet
from diffsynth_dagster.data.table.checked_table import FILE_NAME, PINNED, find_checked
from diffsynth_dagster.data.table.validate import CheckedTable
from diffsynth_dagster.errors import MetadataError
from diffsynth_dagster.older import TABLES
from diffsynth_dagster.report.pictures import UNREADABLE, Picture, embedded
from diffsynth_dagster.run.record import ROWS

HARDEST = 12
"""How many of the hardest rows are shown."""
_MOST_SHAPES = 8
_THUMBNAIL = 224
"""A row's picture has at most as many pixels as a square with this side."""
_MANY_ROWS = 1_000_000
"""Of more rows, captions are not looked at: they would take memory."""
_MOST_PIXELS = 100_000_000
"""Larger pictures have no thumbnail: decoding one would take longer than the rest of the report."""


@dataclass(frozen=True)
class HardRow:
    """A row with a large loss.

    Attributes:
        row: its number in the table, from 1.
        difficulty, visits, stands_out: see `training/row_losses.py`.
        caption: its caption; empty if it has none.
        files: the names of its files, as the table has them.
        picture: its first picture, or the first frame of its clip; None if there is none to read.
    """

    row: int
    difficulty: float
    visits: int
    stands_out: bool
    caption: str
    files: Sequence[str]
    picture: Picture | None


@dataclass(frozen=True)
class DataFacts:
    """What is known of the checked table.

    Attributes:
        source: the table that was checked.
        statuses: status → number of rows, "ok" first.
        rejected: the first rejected rows, each with its number and message.
        shapes: (width, height, frames, number of rows) of the most frequent sizes.
        more_shapes: number of sizes that are not in `shapes`.
        captions: number of different captions; None if rows have no caption, or are too many.
        words: mean and greatest number of words of a caption.
        held_out: number of rows of a held-out table; None without one.
    """

    source: str
    statuses: Mapping[str, int]
    rejected: Sequence[str] = field(default_factory=list[str])
    shapes: Sequence[tuple[int, int, int, int]] = field(
        default_factory=list[tuple[int, int, int, int]]
    )
    more_shapes: int = 0
    captions: int | None = None
    words: tuple[float, int] | None = None
    held_out: int | None = None


def find_table(folder: Path, encoded_in: Path | None) -> CheckedTable | None:
    """The checked table that a training began with; None if it is missing or damaged.

    Args:
        folder: the run folder.
        encoded_in: the folder in which the data set was encoded, if that is another one.
    """
    # Its own link first: the table in the run folder may have been checked again since.
    places = [folder / TABLES / FILE_NAME, folder / PINNED, folder / FILE_NAME]
    if encoded_in is not None:
        places += [encoded_in / PINNED, encoded_in / FILE_NAME]
    for path in places:
        table = _opened(path)
        if table is not None:
            return table
    return None


def _opened(path: Path) -> CheckedTable | None:
    try:
        return find_checked(path)
    except MetadataError:
        return None


def data_facts(folder: Path, table: CheckedTable) -> DataFacts:
    """Facts of a checked table. Raises nothing but what reading its file does: see `TABLE_ERRORS`.

    Args:
        folder: the run folder, which may have a held-out table too.
    """
    counts = table.counts
    others = {name: n for name, n in counts.items() if name != "ok"}
    accepted = table.accepted
    by_size = accepted.group_by("width", "height", "frames").len()
    largest_first = by_size.sort("len", "width", "height", descending=True)
    shapes = largest_first.collect(engine="streaming")
    caption = caption_of(table)
    captions, words = None, None
    if caption is not None and 0 < counts.get("ok", 0) <= _MANY_ROWS:
        length = pl.col(caption).str.count_matches(r"\S+")
        several = isinstance(accepted.collect_schema()[caption], pl.List)
        texts = accepted.select(pl.col(caption).explode() if several else caption)
        row = texts.select(
            pl.col(caption).n_unique().alias("distinct"),
            length.mean().alias("mean"),
            length.max().alias("most"),
        ).collect()
        captions, words = int(row["distinct"][0]), (row["mean"][0], row["most"][0])
    held_out = next(
        (
            found.counts.get("ok", 0)
            for place in (folder / TABLES, folder)
            if (found := _opened(place / "held_out" / FILE_NAME)) is not None
        ),
        None,
    )
    return DataFacts(
        Path(table.source).name,
        {"ok": counts.get("ok", 0), **dict(sorted(others.items(), key=lambda item: -item[1]))},
        table.first_rejected(),
        shapes.head(_MOST_SHAPES).rows(),
        max(0, shapes.height - _MOST_SHAPES),
        captions,
        words,
        held_out,
    )


TABLE_ERRORS = (pl.exceptions.PolarsError, OSError)
"""What reading a table may raise."""


def caption_of(table: CheckedTable) -> str | None:
    """The column with the captions, which are lists if a row may have several; None without one."""
    return CAPTION if CAPTION in table.rows.collect_schema().names() else None


def hardest_rows(folder: Path, table: CheckedTable) -> list[HardRow]:
    """The rows with the largest losses, the hardest first; empty if the losses were not written.

    Raises:
        see `TABLE_ERRORS`.
    """
    losses = folder / ROWS
    if not losses.is_file():
        return []
    # The file is sorted. A semi join, so that only these few rows of a table of any size are read.
    hardest = read_parquet(losses).select("row", "difficulty", "visits", "stands_out").head(HARDEST)
    rows = table.accepted.join(hardest.lazy(), on="row", how="semi").collect()
    caption = caption_of(table)
    found = {row["row"]: row for row in rows.iter_rows(named=True)}
    return [
        HardRow(
            number,
            difficulty,
            visits,
            stands_out,
            "" if caption is None else _as_text(found[number][caption]),
            _names(found[number]),
            _thumbnail(found[number]),
        )
        for number, difficulty, visits, stands_out in hardest.iter_rows()
        if number in found
    ]


def _as_text(captions: str | list[str] | None) -> str:
    """The caption of a row, or its captions."""
    return " / ".join(captions) if isinstance(captions, list) else captions or ""


def _names(row: Mapping[str, Any]) -> list[str]:
    """The files of a row, as the table names them."""
    columns = [name.removesuffix(":path") for name in row if name.endswith(":path")]
    values = [row.get(column) for column in columns]
    names = [v if isinstance(v, list) else [v] for v in values]
    return [str(name) for several in names for name in several if name]


def _thumbnail(row: Mapping[str, Any]) -> Picture | None:
    """The first picture of a row that can be read, or a frame from the middle of its clip."""
    for column in [name.removesuffix(":path") for name in row if name.endswith(":path")]:
        facts = {part: _first(row.get(f"{column}:{part}")) for part in _FACTS}
        path, frames = facts["path"], facts["frames"] or 1
        if path is None or facts["seconds"] is not None:
            continue  # sound has no picture
        if (facts["width"] or 0) * (facts["height"] or 0) > _MOST_PIXELS:
            continue
        try:
            if frames > 1:
                middle = int(frames * (facts["stride"] or 1) / 2)
                (image,) = read_frames(Path(path), [middle], most_side=_THUMBNAIL)
            else:
                image = read_image(Path(path))
        except UNREADABLE:
            continue
        return embedded(image, _THUMBNAIL)
    return None


_FACTS = ("path", "width", "height", "frames", "stride", "seconds")


def _first(value: Any) -> Any:
    """The first of several values, since a column may hold a list of files."""
    return next(iter(value), None) if isinstance(value, list) else value
