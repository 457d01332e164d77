"""A digest inside a Parquet file, by which damage to any of its bytes is found.

Parquet has no digest that polars writes or compares: a flipped bit is another caption, or another
place in the order of samples. Ours is an entry in the file's metadata: write a placeholder of zeros, hash
the file, overwrite the placeholder.

Why not in a file beside it: a table and its digest would be replaced one after the other, while others
read and link them, and be moved, linked and removed as two. Inside, one rename replaces both.
"""

import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path

from blake3 import blake3

from diffsynth_dagster.files import write_whole

_NAME, _LABEL = "diffsynth_dagster.seal", "sealed-blake3:"
_DIGITS = 64
_NONE = b"0" * _DIGITS
_MOST_FOOTER = 1 << 26
"""Bytes: a damaged file may say anything."""
_PART = 1 << 24
"""Bytes that are read at a time."""
_SEAL = re.compile(_LABEL.encode() + rb"([0-9a-f]{%d})" % _DIGITS)


def write_sealed(
    path: Path, write: Callable[[Path, dict[str, str]], object], notes: Mapping[str, str]
) -> Path:
    """Write a Parquet file whole, with notes and a seal.

    Args:
        write: writes the file to a path, with these notes as its metadata.

    Raises:
        OutputError: see `write_whole`.
    """

    def sealed(staged: Path) -> None:
        write(staged, {**notes, _NAME: _LABEL + _NONE.decode()})
        _, place = _find_seal(staged)
        assert place is not None, "the notes are written as they are"
        digest = _digest(staged, place)
        with staged.open("r+b") as file:
            file.seek(place)
            file.write(digest)

    return write_whole(path, sealed)


def seal_is_broken(path: Path) -> bool:
    """Whether a file has a seal and other bytes than those that were sealed.

    Files that were written before there were seals have none: their bytes are taken as they are.

    Raises:
        OSError: it cannot be read.
    """
    footer, place = _find_seal(path)
    if place is None:  # damage to the seal itself may leave a part of it
        return _NAME.encode() in footer or _LABEL.encode() in footer
    with path.open("rb") as file:
        file.seek(place)
        return file.read(_DIGITS) != _digest(path, place)


def _find_seal(path: Path) -> tuple[bytes, int | None]:
    """The end of a Parquet file, which holds its metadata, and where in the file the digits of the seal are."""
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - 8))
        length = int.from_bytes(file.read(4), "little") + 8
        start = file.seek(max(0, size - min(length, _MOST_FOOTER)))
        footer = file.read()
    found = list(_SEAL.finditer(footer))
    return footer, start + found[0].start(1) if len(found) == 1 else None


def _digest(path: Path, place: int) -> bytes:
    """BLAKE3 of a file as it is with zeros for the digits of its seal."""
    hasher = blake3(max_threads=blake3.AUTO)
    with path.open("rb") as file:  # not mapped: a file of ten million rows would count as memory
        while part := file.read(min(_PART, place - file.tell())):
            hasher.update(part)
        hasher.update(_NONE)
        file.seek(place + _DIGITS)
        hasher.update(file.read())
    return hasher.hexdigest().encode()
