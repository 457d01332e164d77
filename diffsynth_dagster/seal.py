"""A digest ("seal") inside a Parquet file that shows damage to any byte of the file.

Polars neither writes nor checks Parquet's checksums, so a flipped bit would silently change a
caption or the order of samples. The seal is an entry in the file's metadata: write a placeholder of
zeros, hash the file, overwrite the placeholder.

Why not in a second file: a table and its digest would be replaced one after the other while other
processes read them, and would have to be moved, linked and removed together. With the digest
inside, one rename replaces both.
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
"""Bytes of the footer that are read at most: in a damaged file its length may be any number."""
_PART = 1 << 24
"""Bytes that are read at a time."""
_SEAL = re.compile(_LABEL.encode() + rb"([0-9a-f]{%d})" % _DIGITS)


def write_sealed(
    path: Path, write: Callable[[Path, dict[str, str]], object], notes: Mapping[str, str]
) -> Path:
    """Write a Parquet file atomically, with notes and a seal.

    Args:
        write: called with a path and notes; writes the file there with the notes as its metadata.
        notes: key-value metadata of the file.

    Raises:
        OutputError: see `write_whole`.
    """

    def sealed(staged: Path) -> None:
        write(staged, {**notes, _NAME: _LABEL + _NONE.decode()})
        _, offset = _find_seal(staged)
        assert offset is not None, "the notes are written as they are"
        digest = _digest(staged, offset)
        with staged.open("r+b") as file:
            file.seek(offset)
            file.write(digest)

    return write_whole(path, sealed)


def seal_is_broken(path: Path) -> bool:
    """Whether a file has a seal, and its bytes are not the sealed ones.

    Files of versions without seals are not broken: there is nothing to compare.

    Raises:
        OSError: it cannot be read.
    """
    footer, offset = _find_seal(path)
    if offset is None:  # no seal, or a damaged one: then its name or label is likely still there
        return _NAME.encode() in footer or _LABEL.encode() in footer
    with path.open("rb") as file:
        file.seek(offset)
        return file.read(_DIGITS) != _digest(path, offset)


def _find_seal(path: Path) -> tuple[bytes, int | None]:
    """The footer of a Parquet file, and the offset in the file of the seal's digits (None if it has
    no seal, or several)."""
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        # A Parquet file ends with its metadata, their length (4 bytes) and "PAR1".
        file.seek(max(0, size - 8))
        length = int.from_bytes(file.read(4), "little") + 8
        start = file.seek(max(0, size - min(length, _MOST_FOOTER)))
        footer = file.read()
    found = list(_SEAL.finditer(footer))
    # The footer also has the least and greatest value of each column, and a caption may contain
    # anything, even another seal.
    return footer, start + found[0].start(1) if len(found) == 1 else None


def _digest(path: Path, offset: int) -> bytes:
    """BLAKE3 of a file with zeros in place of the seal's digits, which start at `offset`."""
    hasher = blake3(max_threads=blake3.AUTO)
    # Not memory-mapped: the pages of a large table would count as memory of this process.
    with path.open("rb") as file:
        while part := file.read(min(_PART, offset - file.tell())):
            hasher.update(part)
        hasher.update(_NONE)
        file.seek(offset + _DIGITS)
        hasher.update(file.read())  # only the rest of the footer
    return hasher.hexdigest().encode()
