"""Read the frames of a clip in order, as a player shows them.

Pillow reads animations (GIF, WebP, APNG, AVIF) and still images, which are clips of one frame.
Other files are read with decord if the check found that it returns the right frames, and with PyAV
if not; see `decoder`. Both decode from the first frame up to the last one that is needed and never
seek: where a decoder lands after seeking depends on the container and the codec.
"""

from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import av
from av.container import InputContainer
from av.video.stream import VideoStream
from PIL import Image, UnidentifiedImageError

from diffsynth_dagster.data.media.colour import Look
from diffsynth_dagster.data.media.decoder import UPRIGHT, displayed, orientation, pixels_of, upright
from diffsynth_dagster.data.media.image import as_rgb, open_image

ANIMATED = ("GIF", "WEBP", "PNG", "AVIF")
_THREADS = 4
"""Threads of a decoder. Every thread keeps frames in memory."""
_MOST_PIXELS = 1920 * 1088
"""Largest frame that decord reads, in pixels, since it keeps up to 60 frames in memory."""


@dataclass(frozen=True)
class Frame:
    """A frame in upright RGB.

    Attributes:
        size: (width, height) at which it is displayed. It differs from the size of `image` if the
            pixels are not square.
    """

    image: Image.Image
    size: tuple[int, int]


class Clip(Protocol):
    """An open file whose frames can be read.

    Attributes:
        pixels: number of pixels of a frame.
        held: number of frames to count in the `PixelBudget` while the clip is read, for all that
            the decoder keeps. A pixel of the budget stands for 12 bytes (float32 RGB).
    """

    pixels: int
    held: int

    def frames(self, indices: Sequence[int]) -> Iterator[Frame]:
        """Yield frames, counted from 0. A frame is valid only until the next one is requested.

        Args:
            indices: in ascending order, each once. Indices after the end of the file are skipped.

        Raises:
            OSError, ValueError, …: see `IMAGE_ERRORS`; the file is damaged.
        """
        ...


@contextmanager
def open_clip(path: Path, by_decord: bool, look: Look | None = None) -> Generator[Clip]:
    """Open a clip.

    Args:
        by_decord: use decord, if it is installed, the frames are not too large, and Pillow does not
            read the file. The check must have found that decord returns the right frames.
        look: how the colours of an animation or a picture are read; None means `Look()`.

    Raises:
        OSError, ValueError, …: see `IMAGE_ERRORS`; it is damaged or of no known format.
    """
    try:
        opened = open_image(path)
    except UnidentifiedImageError:
        with av.open(str(path), options={"protocol_whitelist": "file"}) as container:
            stream = container.streams.best("video")
            if not isinstance(stream, VideoStream):
                raise OSError(f"{path}: it has no video") from None
            small = stream.width * stream.height <= _MOST_PIXELS
            reader = _decord(path) if by_decord and small else None
            yield _Video(container, stream) if reader is None else _InOrder(reader, stream)
        return
    with opened as image:
        yield _Animation(image, look or Look())


def _decord(path: Path) -> Any:
    """decord's reader of a file; None if decord is not installed."""
    try:
        import decord
    except ImportError:
        return None
    return decord.VideoReader(str(path), ctx=decord.cpu(0), num_threads=_THREADS)


class _Animation:
    """A `Clip` that Pillow reads."""

    held = 1

    def __init__(self, image: Image.Image, look: Look) -> None:
        self._image, self._look = image, look
        self.pixels = image.width * image.height

    def frames(self, indices: Sequence[int]) -> Iterator[Frame]:
        """See `Clip`."""
        count = frame_count(self._image)
        for index in indices:
            if index >= count:
                return
            if count > 1:
                self._image.seek(index)
            yield self._frame()  # not kept in a variable here, which would hold its memory

    def _frame(self) -> Frame:
        image = as_rgb(self._image, self._look)
        return Frame(image, image.size)


class _Video:
    """A `Clip` that PyAV reads."""

    held = 2

    def __init__(self, container: InputContainer, stream: VideoStream) -> None:
        self._container, self._stream = container, stream
        stream.codec_context.thread_count = _THREADS
        stream.thread_type = "AUTO"  # also decode several frames at once, not only slices of one
        self.pixels = stream.width * stream.height

    def frames(self, indices: Sequence[int]) -> Iterator[Frame]:
        """See `Clip`."""
        wanted = iter(indices)
        index, turn = next(wanted, None), UPRIGHT
        for number, frame in enumerate(self._container.decode(self._stream)):
            if number == 0:
                turn = orientation(frame)
            if number != index:  # decoded, since later frames refer to it, but not converted
                continue
            size = displayed(self._stream, frame, turn)
            pixels = upright(frame.to_ndarray(format="rgb24"), turn)
            yield Frame(Image.fromarray(pixels), size)
            index = next(wanted, None)
            if index is None:
                return


class _InOrder:
    """A `Clip` that decord reads, one frame after the other."""

    held = 16

    def __init__(self, reader: Any, stream: VideoStream) -> None:
        self._reader = reader
        self.pixels = stream.width * stream.height

    def frames(self, indices: Sequence[int]) -> Iterator[Frame]:
        """See `Clip`."""
        wanted = set(indices)
        for number in range(min(indices[-1] + 1, len(self._reader)) if indices else 0):
            pixels = self._reader.next()
            if number in wanted:
                image = Image.fromarray(pixels_of(pixels))
                yield Frame(image, image.size)


def frame_count(image: Image.Image) -> int:
    """Number of frames of an animation; 1 for any other image, even a TIFF of several pages."""
    return int(getattr(image, "n_frames", 1)) if image.format in ANIMATED else 1
