"""Find files that are cut short, from the lengths in their headers.

Decoders read as far as they can, so the missing end of a file may go unnoticed: a PNG without its
last checksum, a Matroska video without its second half. The formats below say in their headers how
long the file must be. Files of other formats are not checked.
"""

import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

_EBML = b"\x1a\x45\xdf\xa3"
"""Start of a Matroska or WebM file."""
_SEGMENT = 0x18538067
"""Identity of the Matroska element that holds all of the media."""
_LAST_PAGE = 4
"""Flag of the last page of an Ogg stream."""
_BOXES = (b"ftyp", b"moov", b"mdat", b"free", b"skip", b"wide", b"pnot", b"styp", b"moof")


def cut_short(path: Path) -> str | None:
    """A message if the end of the file is missing; else None.

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
"""(file at its start, its size in bytes) → whether its end is missing."""


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
    """PNG. Its chunks end with IEND."""
    place = 8  # after the signature
    while place + 12 <= size:
        file.seek(place)
        length, kind = struct.unpack(">I4s", file.read(8))
        place += 12 + length  # length, kind and checksum are 4 bytes each
        if kind == b"IEND":
            return place > size
    return True


def _gif(file: BinaryIO, size: int) -> bool:
    """GIF. Its blocks end with the trailer `;`."""
    file.seek(10)
    flags = file.read(3)[:1]
    if not flags:
        return True
    file.seek(13 + _colours(flags[0]))
    while True:
        mark = file.read(1)
        if mark == b";":
            return False
        if mark == b"!":  # an extension: one byte says which
            file.seek(1, os.SEEK_CUR)
        elif mark == b",":  # an image: position, size and flags, a colour table, the code size
            description = file.read(9)
            if len(description) < 9:
                return True
            file.seek(_colours(description[8]) + 1, os.SEEK_CUR)
        elif mark != b"\x00" or file.tell() > size:
            return not mark  # end of file; or an unknown block, which the decoder will judge
        if mark in b"!," and not _gif_blocks(file):
            return True


def _colours(flags: int) -> int:
    """Size in bytes of the colour table that the flags announce; 0 if there is none."""
    return 3 << ((flags & 7) + 1) if flags & 0x80 else 0


def _gif_blocks(file: BinaryIO) -> bool:
    """Skip a sequence of data blocks. Returns whether its end was found."""
    while True:
        length = file.read(1)
        if not length:
            return False
        if length == b"\x00":
            return True
        file.seek(length[0], os.SEEK_CUR)


def _riff(file: BinaryIO, size: int) -> bool:
    """AVI, WAV and WebP. Writers that cannot seek leave 0 or all ones in place of the length."""
    place = end = 0
    while place + 8 <= size:
        file.seek(place)
        # A long AVI consists of several RIFF chunks.
        kind, length = struct.unpack("<4sI", file.read(8))
        if kind != b"RIFF" or length in (0, 0xFFFFFFFF):
            return False
        end = place + 8 + length
        place = end + length % 2  # chunks start at even places; the last may lack the padding
    return size < max(end, 8)


def _boxes(file: BinaryIO, size: int) -> bool:
    """MP4 and QuickTime. A box of length 0 reaches to the end of the file."""
    place = 0
    while place + 8 <= size:
        file.seek(place)
        length, header = int.from_bytes(file.read(4)), 8
        file.seek(4, os.SEEK_CUR)
        if length == 1:  # the real length follows in 64 bits
            length, header = int.from_bytes(file.read(8)), 16
        if length == 0:
            return False
        if length < header:
            return True
        place += length
    return place != size


def _ogg(file: BinaryIO, size: int) -> bool:
    """Ogg. The last page of a stream has a flag that says so."""
    place, flags = 0, 0
    while place + 27 <= size:
        file.seek(place)
        page = file.read(27)
        if not page.startswith(b"OggS"):
            return False  # not a page; the decoder will judge
        flags = page[5]
        # The header ends with a table of segment lengths; its number of entries is byte 26.
        place += 27 + page[26] + sum(file.read(page[26]))
    return place != size or not flags & _LAST_PAGE


def _mp3(file: BinaryIO, size: int) -> bool:
    """MP3. In most files the first frame states the file's length, after `Xing` or `Info`."""
    start, head = 0, file.read(10)
    if head.startswith(b"ID3"):  # skip the tag; its length has 7 bits in each of 4 bytes
        start = 10 + sum((byte & 127) << 7 * (3 - n) for n, byte in enumerate(head[6:10]))
    file.seek(start)
    frame = file.read(64)
    mark = max(frame.find(b"Xing"), frame.find(b"Info"))
    if mark < 0 or len(frame) < mark + 16:
        return False
    # Flag 1: the number of frames is given. Flag 2: the number of bytes is given, after it.
    flags, first, second = struct.unpack(">III", frame[mark + 4 : mark + 16])
    length = second if flags & 1 else first
    return bool(flags & 2) and size < start + length


def _matroska(file: BinaryIO, size: int) -> bool:
    """Matroska and WebM. The length of the segment is unknown in a live recording."""
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
    """Read an EBML number of 1 to 8 bytes.

    Returns:
        The number, None if it is missing or invalid; and whether it is the reserved "unknown".
    """
    first = file.read(1)
    if not first or not first[0]:
        return None, False
    # The leading zero bits of the first byte count the bytes that follow; the 1 after them is a
    # mark, which belongs to an identity but not to a length.
    width = 9 - first[0].bit_length()
    rest = file.read(width - 1)
    if len(rest) < width - 1:
        return None, False
    value = int.from_bytes(first + rest)
    without_mark = value & ~(1 << (7 * width))
    unknown = without_mark == (1 << (7 * width)) - 1  # all ones
    return (value if keep_mark else without_mark), unknown
