"""A Parquet file that says what its own bytes are, so that damage to any of them is found.

Parquet has no digest that polars writes or compares: a flipped bit is another caption, or another
place in the order of samples. The seal is an entry among the file's notes, first of zeros, that the
BLAKE3 of the file with these zeros is written over.
"""

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
        place, digest = _place_and_digest(staged)
        assert place is not None, "the notes are written as they are"
        with staged.open("r+b") as file:
            file.seek(place)
            file.write(digest.encode())

    return write_whole(path, sealed)


def seal_is_broken(path: Path) -> bool:
    """Whether a file has a seal and other bytes than those that were sealed.

    Files that were written before there were seals have none: their bytes are taken as they are.

    Raises:
        OSError: it cannot be read.
    """
    if path.stat().st_size == 0:
        return False
    place, digest = _place_and_digest(path)
    if place is not None:
        with path.open("rb") as file:
            file.seek(place)
            return file.read(_DIGITS) != digest.encode()
    # Damage to the seal itself may leave a part of it.
    footer = _footer(path)
    return _NAME.encode() in footer or _LABEL.encode() in footer


def _footer(path: Path) -> bytes:
    """The end of a Parquet file, which holds its notes."""
    size = path.stat().st_size
    with path.open("rb") as file:
        file.seek(max(0, size - 8))
        length = int.from_bytes(file.read(4), "little") + 8
        file.seek(max(0, size - min(length, _MOST_FOOTER)))
        return file.read()


def _place_and_digest(path: Path) -> tuple[int | None, str]:
    """Where in a file the digits of the seal are, if it has one, and what they have to be."""
    footer, size = _footer(path), path.stat().st_size
    found = list(_SEAL.finditer(footer))
    if len(found) != 1:
        return None, ""
    place = size - len(footer) + found[0].start(1)
    hasher = blake3(max_threads=blake3.AUTO)
    with path.open("rb") as file:  # not mapped: a file of ten million rows would count as memory
        while part := file.read(min(_PART, place - file.tell())):
            hasher.update(part)
        hasher.update(_NONE)
        file.seek(place + _DIGITS)
        hasher.update(file.read())
    return place, hasher.hexdigest()
