"""Reading the files of a row, at the sizes and frames they are trained at.

What is read must be what was checked: a file whose state (`facts.FileState`) differs is digested
again, and refused if its content is another one.

Which files a column of a row names is passed on as a JSON value, so that a manifest can hold it:
the checked table's facts about the column, each a list where the column takes many files. Of sound
the target is the sample rate and the channels, and the frames are samples.

    {"path": …, "digest": …, "size": …, "modified": …, "target": [width, height], "frames": …,
     "stride": …, "shown": [index, …], "reading": …}

`shown` says which frames of a clip are read, as they are decoded in order. It is null where the stride
says it, and decord gives the frames in order. `reading` says how colours are read: see `colour`.
"""

from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import polars as pl

from diffsynth_dagster.data.columns import Input
from diffsynth_dagster.data.media.audio import AUDIO_ERRORS, load_sample_audio
from diffsynth_dagster.data.media.budget import short_of_memory
from diffsynth_dagster.data.media.colour import look_of
from diffsynth_dagster.data.media.image import load_sample_image, read_image
from diffsynth_dagster.data.media.video import load_sample_video
from diffsynth_dagster.errors import MetadataError
from diffsynth_dagster.facts import FileState, digest_file
from diffsynth_dagster.shortage import says_short

Files = dict[str, Any]
READ_BY = ("target", "frames", "stride", "shown", "reading")
"""The parts that say how a file is read."""
PARTS: tuple[str, ...] = ("path", "digest", "size", "modified", *READ_BY)
_READ_ANEW = "check the data set again: run the training anew, or materialize its metadata"


def files_of(row: Mapping[str, Any], item: Input) -> Files:
    """The files that a column of a checked row names."""
    return {part: row[f"{item.column}:{part}"] for part in PARTS}


def files_as_json(item: Input) -> pl.Expr:
    """The same as JSON text, for every row of a checked table."""
    parts = [pl.col(f"{item.column}:{part}").alias(part) for part in PARTS]
    return pl.struct(parts).struct.json_encode()


def trained_sizes(files: Files, item: Input) -> list[Any]:
    """How the files are read: sizes, for videos the frames that are taken, for sound the rate,
    channels and samples; nothing where an optional column names no file. Where colours are not taken
    as they are in the file, an object with these and the words that say how.

    Keys of samples are made of it. What is read as it always was says the same as ever.
    """
    if files["target"] is None:
        return []
    words = _listed(files, item, "reading")
    sizes = _sizes(files, item)
    return [{"reading": words, "sizes": sizes}] if any(words) else sizes


def _sizes(files: Files, item: Input) -> list[Any]:
    listed = {part: _listed(files, item, part) for part in READ_BY}
    targets = [list(target) for target in listed["target"]]
    if item.kind == "audio":
        return [targets, listed["frames"]]
    if item.kind != "video":
        return targets
    shown = [] if all(one is None for one in listed["shown"]) else [listed["shown"]]
    return [targets, listed["frames"], listed["stride"], *shown]


def _listed(files: Files, item: Input, part: str) -> list[Any]:
    # Files that were named before there was this part lack it.
    value = files.get(part)
    if item.many:
        return [None] * len(files["target"]) if value is None else list(value)
    return [value]


def parse_value(text: str, item: Input) -> str | int | float | tuple[int, ...]:
    """The value of a column that names no file."""
    if item.kind == "text":
        return text
    if item.kind == "sizes":
        return tuple(int(part) for part in text.split(","))
    try:
        return int(text)  # exactly: a seed may have more digits than a float
    except ValueError:
        number = float(text)
        return int(number) if number.is_integer() else number


def load_files(files: Files, item: Input, row: int) -> Any:
    """Read the files of a column.

    Args:
        row: number of the row in the metadata, for messages.

    Returns:
        float32 in [-1, 1]: (3, H, W) for an image and (3, F, H, W) for a video; an RGB Pillow
        image for a picture; (channels, samples) for sound; a list of these where the input takes
        many; None where an optional column names no file.

    Raises:
        MetadataError: a file is no longer what was checked, or cannot be read.
        OutOfMemory: memory is not enough to read it.
    """
    if files["path"] is None:
        return None
    loaded: list[Any] = []
    for values in zip(*(_listed(files, item, part) for part in PARTS), strict=True):
        one: Files = dict(zip(PARTS, values, strict=True))
        where = f"row {row} of the metadata, {item.column}: {one['path']}"
        try:
            _require_unchanged(one, item, where)
            loaded.append(_load_one(one, item))
            _require_unchanged(one, item, where)  # nor while it was read
        except (*AUDIO_ERRORS, MemoryError) as error:
            if says_short(error) is not None:
                raise short_of_memory(item.kind, where) from error
            raise MetadataError(
                f"the {item.kind} was readable when it was checked, and is not now: {error}",
                where=where,
                do=f"put the file back, or {_READ_ANEW}",
            ) from error
    return loaded if item.many else loaded[0]


def _load_one(one: Files, item: Input) -> Any:
    path, size = Path(one["path"]), (one["target"][0], one["target"][1])
    look = look_of(one["reading"])
    if item.kind == "image":
        return load_sample_image(path, size, look)
    if item.kind == "picture":
        return read_image(path, look)
    if item.kind == "audio":
        return load_sample_audio(path, item.rate, item.channels, one["frames"])
    return load_sample_video(path, size, one["frames"], one["stride"], one["shown"], look)


@lru_cache(maxsize=1 << 16)
def _digest(path: Path, state: FileState) -> str:
    """BLAKE3 of a file in a state, computed once for all visits."""
    return digest_file(path)


def _require_unchanged(one: Files, item: Input, where: str) -> None:
    """Refuse a file that is no longer what was checked; a file that was only touched, or copied to
    another machine, is.

    Raises:
        MetadataError: it has another content.
        OSError: it is not there, or cannot be read.
    """
    path = Path(one["path"])
    state = FileState.of(path)
    if state == (one["size"], one["modified"]):
        return
    if state.size != one["size"] or _digest(path, state) != one["digest"]:
        raise MetadataError(
            f"the {item.kind} is no longer the one that was checked: its content has changed",
            where=where,
            do=f"put the file back, or {_READ_ANEW}",
        )
