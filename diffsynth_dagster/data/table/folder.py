"""Use a folder as a metadata table: one row for each picture or clip in it and in its subfolders.

Captions are read from text files beside them: see `caption_files`.
"""

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NoReturn

import polars as pl
from PIL import Image

from diffsynth_dagster.config.output import TABLES
from diffsynth_dagster.data.columns import Input
from diffsynth_dagster.data.listing import walk
from diffsynth_dagster.data.table.read import INDEX, Table
from diffsynth_dagster.errors import MetadataError, is_text

_CLIPS = {
    ".avi",
    ".flv",
    ".m4v",
    ".mkv",
    ".mov",
    ".mp4",
    ".mpeg",
    ".mpg",
    ".ogv",
    ".ts",
    ".webm",
    ".wmv",
}
_NUMBERED = re.compile(r"([1-9]\d{0,2})_(.+)")
"""Folder names such as 10_portraits, a convention of kohya's scripts: the samples show portraits,
and each pass over the data set takes them 10 times."""


def numbered(folder: str) -> tuple[int, str] | None:
    """Parse the innermost name in a folder's path that is like 10_portraits.

    Returns:
        (how often its samples are taken, what they show); None if no name is like that.
    """
    matches = filter(None, map(_NUMBERED.fullmatch, reversed(folder.split("/"))))
    innermost = next(matches, None)
    return None if innermost is None else (int(innermost[1]), innermost[2])


def open_folder(
    folder: Path, base: Path, item: Input, sound: Sequence[str] = (), left_out: Sequence[str] = ()
) -> Table:
    """List the files of a folder as a table, ordered by name.

    Hidden files, run folders and stores are skipped. A column of pictures takes pictures; a column
    of clips takes clips and pictures.

    Args:
        base: the folder that the paths in the table are relative to.
        item: the column of the files.
        sound: further columns, which name the same clips for their sound.
        left_out: further folders to skip.

    Raises:
        MetadataError: the folder holds a metadata table, or no file that the column takes.
    """
    # Imported here because it imports torch, which reading a checked table does not need.
    from diffsynth_dagster.data.media.image import IMAGE_FORMATS

    tables = [name for name in (f"metadata{kind}" for kind in TABLES) if (folder / name).is_file()]
    if tables:
        raise MetadataError(
            f"the folder holds '{tables[0]}', and no metadata table is named",
            where=str(folder.absolute()),
            do=f"give dataset_metadata_path = {folder / tables[0]}, or take that file out of the folder "
            "if its files are the whole data set",
        )
    wanted = {e for e, name in Image.registered_extensions().items() if name in IMAGE_FORMATS}
    if item.kind == "video":  # a picture is a clip of one frame
        wanted |= _CLIPS
    # The run folder and the store may lie in the data folder.
    skipped = {os.path.realpath(path) for path in left_out} - {os.path.realpath(folder)}
    found = (name for name, _ in walk(str(folder), skipped))
    names = sorted(name for name in found if os.path.splitext(name)[1].lower() in wanted)
    if not names:
        _refuse_empty(folder, item)
    odd = [name for name in names if not is_text(name)]
    if odd:
        raise MetadataError(
            f"the name of a file is not UTF-8: {odd[0]!r}",
            where=str(folder.absolute()),
            do="rename it",
        )
    start = os.path.relpath(folder, base)
    paths = names if start == "." else [os.path.join(start, name) for name in names]
    columns = (item.column, *sound)
    # Only clips can have sound; the other rows have null there.
    clips = [path if os.path.splitext(path)[1].lower() in _CLIPS else None for path in paths]
    values = {item.column: paths, **dict.fromkeys(sound, clips)}
    rows = pl.DataFrame(values, schema=dict.fromkeys(columns, pl.String()))
    return Table(rows.with_row_index(INDEX), columns)


def class_names(rows: pl.DataFrame, column: str) -> Mapping[str, str]:
    """Path → what the sample shows, for files in folders that are named like 10_portraits."""
    parsed = {path: numbered(os.path.dirname(path)) for path in rows[column]}
    return {path: name[1] for path, name in parsed.items() if name is not None}


def _refuse_empty(folder: Path, item: Input) -> NoReturn:
    what = "no picture or clip" if item.kind == "video" else "no picture"
    raise MetadataError(
        f"the folder holds {what}",
        where=str(folder.absolute()),
        do="correct dataset_base_path, or name a metadata table as dataset_metadata_path",
    )
