"""Find files that are cut short, by the lengths in their own headers.

Decoders read as far as they can, so the end of a cut file may be missing unnoticed: a PNG without
its last checksum, a Matroska video without its second half. The headers of the formats below contain
the length that the file must have. Files of other formats are not checked.
"""

import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

_EBML = b"\x1a\x45\xdf\xa3"
_SEGMENT = 0x18538067
_LAST_PAGE = 4
_BOXES = (b"ftyp", b"moov", b"mdat", b"free", b"skip", b"wide", b"pnot", b"styp", b"moof")


def cut_short(path: Path) -> str | None:
    """Why a file is damaged, if its end is missing; else None.

    Raises:
        OSError: the file cannot be read.
    """
    size = os.path.getsize(path)
    with path.open("rb") as file:
        head = file.read(12)
        file.seek(0)
        walk = _walker(head)
        missing = walk(file, size) if walk is not None else False
    return "the file is cut short" if missing else None


_Walker = Callable[[BinaryIO, int], bool]
"""(file at its start, its size in bytes) → whether something is missing."""


def _walker(head: bytes) -> _Walker | None:
    if head.startswith(b"\x89PNG\r\n\x1a\n"):
        return _png
    if head[:6] in (b"GIF87a", b"GIF89a"):
        return _gif
    if head.startswith(b"RIFF"):
        return _riff
    if head.startswith(_EBML):
        return _matroska
    if head[4:8] in _BOXES:
        return _boxes
    if head.startswith(b"OggS"):
        return _ogg
    # A frame of MPEG audio, layer III, or the tag that may stand before the first one.
    if head.startswith(b"ID3") or (len(head) > 1 and head[0] == 255 and head[1] & 0xE6 == 0xE2):
        return _mp3
    return None


def _png(file: BinaryIO, size: int) -> bool:
    place = 8
    while place + 12 <= size:
        file.seek(place)
        length, kind = struct.unpack(">I4s", file.read(8))
        place += 12 + length
        if kind == b"IEND":
            return place > size
    return True


def _gif(file: BinaryIO, size: int) -> bool:
    file.seek(10)
    flags = file.read(3)[:1]
    if not flags:
        return True
    file.seek(13 + _colours(flags[0]))
    while True:
        mark = file.read(1)
        if mark == b";":
            return False
        if mark == b"!":
            file.seek(1, os.SEEK_CUR)
        elif mark == b",":
            description = file.read(9)
            if len(description) < 9:
                return True
            file.seek(_colours(description[8]) + 1, os.SEEK_CUR)
        elif mark != b"\x00" or file.tell() > size:
            return not mark  # an unknown block: whether it is valid shows when it is decoded
        if mark in b"!," and not _gif_blocks(file):
            return True


def _colours(flags: int) -> int:
    """Bytes of the colour table that the flags announce."""
    return 3 << ((flags & 7) + 1) if flags & 0x80 else 0


def _gif_blocks(file: BinaryIO) -> bool:
    """Skip a run of data blocks. Returns whether its end is there."""
    while True:
        length = file.read(1)
        if not length:
            return False
        if length == b"\x00":
            return True
        file.seek(length[0], os.SEEK_CUR)


def _riff(file: BinaryIO, size: int) -> bool:
    """AVI, WAV and WebP. Writers that could not seek leave the length 0 or all ones."""
    place = end = 0
    while place + 8 <= size:
        file.seek(place)
        kind, length = struct.unpack("<4sI", file.read(8))
        if kind != b"RIFF" or length in (0, 0xFFFFFFFF):
            return False
        end = place + 8 + length
        place = end + length % 2
    return size < max(end, 8)


def _boxes(file: BinaryIO, size: int) -> bool:
    """MP4 and QuickTime. A length of 0 means: to the end of the file."""
    place = 0
    while place + 8 <= size:
        file.seek(place)
        length, header = int.from_bytes(file.read(4)), 8
        file.seek(4, os.SEEK_CUR)
        if length == 1:
            length, header = int.from_bytes(file.read(8)), 16
        if length == 0:
            return False
        if length < header:
            return True
        place += length
    return place != size


def _ogg(file: BinaryIO, size: int) -> bool:
    """Ogg. The last page of a stream is marked as such."""
    place, flags = 0, 0
    while place + 27 <= size:
        file.seek(place)
        page = file.read(27)
        if not page.startswith(b"OggS"):
            return False  # whether that is valid shows when it is decoded
        flags = page[5]
        place += 27 + page[26] + sum(file.read(page[26]))
    return place != size or not flags & _LAST_PAGE


def _mp3(file: BinaryIO, size: int) -> bool:
    """MP3. The first frame of most files holds the length of all, after the mark Xing or Info."""
    start, head = 0, file.read(10)
    if head.startswith(b"ID3"):
        start = 10 + sum((byte & 127) << 7 * (3 - n) for n, byte in enumerate(head[6:10]))
    file.seek(start)
    frame = file.read(64)
    mark = max(frame.find(b"Xing"), frame.find(b"Info"))
    if mark < 0 or len(frame) < mark + 16:
        return False
    flags, first, second = struct.unpack(">III", frame[mark + 4 : mark + 16])
    length = second if flags & 1 else first
    return bool(flags & 2) and size < start + length


def _matroska(file: BinaryIO, size: int) -> bool:
    """Matroska and WebM. A live recording leaves the segment's length unknown."""
    while file.tell() < size:
        identity, _ = _number(file, keep_mark=True)
        length, unknown = _number(file, keep_mark=False)
        if identity is None or length is None:
            return True
        if identity == _SEGMENT:
            return not unknown and file.tell() + length > size
        file.seek(length, os.SEEK_CUR)
    return True


def _number(file: BinaryIO, keep_mark: bool) -> tuple[int | None, bool]:
    """A number of 1 to 8 bytes as EBML writes it, and whether it is the reserved "unknown"."""
    first = file.read(1)
    if not first or not first[0]:
        return None, False
    width = 9 - first[0].bit_length()
    rest = file.read(width - 1)
    if len(rest) < width - 1:
        return None, False
    value = int.from_bytes(first + rest)
    without_mark = value & ~(1 << (7 * width))
    unknown = without_mark == (1 << (7 * width)) - 1
    return (value if keep_mark else without_mark), unknown
