"""Read the files of a row at the size and length they are trained at.

A file must be the one that was checked. If its size or modification time differs
(`facts.FileState`), it is digested again, and refused if its content has changed.

The files of a column are described by a JSON value, so that a manifest can store it. It holds what
the checked table knows about the column. Every entry is a list if the column takes many files. For
sound, `target` is [sample rate, channels] and `frames` counts samples.

    {"path": …, "digest": …, "size": …, "modified": …, "target": [width, height], "frames": …,
     "stride": …, "shown": [index, …], "reading": …}

`shown` lists the frames of a clip that are read, numbered in decoding order. It is null if the
stride alone determines them and decord returns the frames in order. `reading` says how colours are
read: see `colour`.
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
"""The entries that determine how a file is read."""
PARTS: tuple[str, ...] = ("path", "digest", "size", "modified", *READ_BY)
_READ_ANEW = "check the data set again: run the training anew, or materialize its metadata"


def files_of(row: Mapping[str, Any], item: Input) -> Files:
    """The files that a row of a checked table names in a column."""
    return {part: row[f"{item.column}:{part}"] for part in PARTS}


def files_as_json(item: Input) -> pl.Expr:
    """`files_of` as JSON text, for every row of a checked table."""
    parts = [pl.col(f"{item.column}:{part}").alias(part) for part in PARTS]
    return pl.struct(parts).struct.json_encode()


def trained_sizes(files: Files, item: Input) -> list[Any]:
    """The part of a sample's key that says how its files are read.

    Returns:
        Sizes; for videos also the frames that are taken; for sound the rate, channels and number of
        samples. If colours are converted, one object with these and the words of `reading`. Empty
        if an optional column names no file.
    """
    if files["target"] is None:
        return []
    words = _listed(files, item, "reading")
    sizes = _sizes(files, item)
    # The object appears only with a conversion: all other samples keep the keys they have in
    # existing stores.
    return [{"reading": words, "sizes": sizes}] if any(words) else sizes


def _sizes(files: Files, item: Input) -> list[Any]:
    listed = {part: _listed(files, item, part) for part in READ_BY}
    targets = [list(target) for target in listed["target"]]
    if item.kind == "audio":
        return [targets, listed["frames"]]
    if item.kind != "video":
        return targets
    # Left out rather than null, for the same reason: existing keys must not change.
    shown = [] if all(indices is None for indices in listed["shown"]) else [listed["shown"]]
    return [targets, listed["frames"], listed["stride"], *shown]


def _listed(files: Files, item: Input, part: str) -> list[Any]:
    value = files.get(part)  # manifests of earlier versions lack the newer parts
    if item.many:
        return [None] * len(files["target"]) if value is None else list(value)
    return [value]


def parse_value(text: str, item: Input) -> str | int | float | tuple[int, ...]:
    """Convert the text of a column that names no files to the value that the model is given."""
    if item.kind == "text":
        return text
    if item.kind == "sizes":
        return tuple(int(part) for part in text.split(","))
    try:
        return int(text)  # not by way of float, which cannot represent every large seed
    except ValueError:
        number = float(text)
        return int(number) if number.is_integer() else number


def load_files(files: Files, item: Input, row: int) -> Any:
    """Read the files of a column.

    Args:
        row: number of the row in the metadata, for messages.

    Returns:
        float32 in [-1, 1]: (3, H, W) for an image, (3, F, H, W) for a video, (channels, samples)
        for sound; an RGB Pillow image for a picture; a list of these if the input takes many; None
        if an optional column names no file.

    Raises:
        MetadataError: a file has changed since it was checked, or cannot be read.
        OutOfMemory: there is not enough memory to read a file.
    """
    if files["path"] is None:
        return None
    loaded: list[Any] = []
    for values in zip(*(_listed(files, item, part) for part in PARTS), strict=True):
        file: Files = dict(zip(PARTS, values, strict=True))
        where = f"row {row} of the metadata, {item.column}: {file['path']}"
        try:
            _require_unchanged(file, item, where)
            loaded.append(_load_one(file, item))
            _require_unchanged(file, item, where)  # it may have been replaced while it was read
        except (*AUDIO_ERRORS, MemoryError) as error:
            # Lack of memory is reported as such: it does not mean that the file is damaged.
            if says_short(error) is not None:
                raise short_of_memory(item.kind, where) from error
            raise MetadataError(
                f"the {item.kind} was readable when it was checked, and is not now: {error}",
                where=where,
                do=f"put the file back, or {_READ_ANEW}",
            ) from error
    return loaded if item.many else loaded[0]


def _load_one(file: Files, item: Input) -> Any:
    path, size = Path(file["path"]), (file["target"][0], file["target"][1])
    look = look_of(file["reading"])
    if item.kind == "image":
        return load_sample_image(path, size, look)
    if item.kind == "picture":
        return read_image(path, look)
    if item.kind == "audio":
        return load_sample_audio(path, item.rate, item.channels, file["frames"])
    return load_sample_video(path, size, file["frames"], file["stride"], file["shown"], look)


@lru_cache(maxsize=1 << 16)
def _digest(path: Path, state: FileState) -> str:
    """BLAKE3 of a file, cached while its size and modification time (`state`) are the same."""
    return digest_file(path)


def _require_unchanged(file: Files, item: Input, where: str) -> None:
    """Refuse a file whose content has changed since it was checked.

    Raises:
        MetadataError: its content has changed.
        OSError: it does not exist or cannot be read.
    """
    path = Path(file["path"])
    state = FileState.of(path)
    if state == (file["size"], file["modified"]):
        return
    # A file that was only touched or copied has a new modification time: its content decides.
    if state.size != file["size"] or _digest(path, state) != file["digest"]:
        raise MetadataError(
            f"the {item.kind} is no longer the one that was checked: its content has changed",
            where=where,
            do=f"put the file back, or {_READ_ANEW}",
        )
