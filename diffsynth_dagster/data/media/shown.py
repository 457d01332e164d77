"""The frames of a clip that a player shows, one after the other.

Animations (GIF, WebP, APNG, AVIF) are read by Pillow, and a still image is a clip of one frame. All
else is read by decord where the check found that its frames are those, and by PyAV where not; see
`decoder`. Both begin with the first frame and decode all up to the last one that is asked for: where
decoders jump to, between key frames, depends on the container and the codec.
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
from diffsynth_dagster.data.media.decoder import displayed, orientation, upright
from diffsynth_dagster.data.media.image import as_rgb, open_image

ANIMATED = ("GIF", "WEBP", "PNG", "AVIF")
_THREADS = 4
"""Of a decoder: each holds frames of its own."""


@dataclass(frozen=True)
class Frame:
    """A frame in RGB, upright.

    Attributes:
        size: (width, height) that it is shown at. Those of the image differ where its pixels are not
            square.
    """

    image: Image.Image
    size: tuple[int, int]


class Clip(Protocol):
    """A file whose frames are read.

    Attributes:
        pixels: of a frame.
    """

    pixels: int

    def frames(self, indices: Sequence[int]) -> Iterator[Frame]:
        """Frames, counted from 0.

        Args:
            indices: in rising order, each once. Those that the file does not have are left out.

        Raises:
            OSError, ValueError, …: see `IMAGE_ERRORS`; the file is damaged.
        """
        ...


@contextmanager
def open_clip(path: Path, by_decord: bool, look: Look | None = None) -> Generator[Clip]:
    """Open a clip.

    Args:
        by_decord: whether decord reads it, unless Pillow does or decord is not there.
        look: how the colours of an animation or a picture are read; None as `Look()` says.

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
            reader = _decord(path) if by_decord else None
            yield _Video(container, stream) if reader is None else _InOrder(reader, stream)
        return
    with opened as image:
        yield _Animation(image, look or Look())


def _decord(path: Path) -> Any:
    """decord's reader of a file; None where decord is not installed."""
    try:
        import decord
    except ImportError:
        return None
    return decord.VideoReader(str(path), ctx=decord.cpu(0), num_threads=_THREADS)


class _Animation:
    """What Pillow reads."""

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
            image = as_rgb(self._image, self._look)
            yield Frame(image, image.size)


class _Video:
    """What PyAV reads."""

    def __init__(self, container: InputContainer, stream: VideoStream) -> None:
        self._container, self._stream = container, stream
        stream.codec_context.thread_count = _THREADS
        stream.thread_type = "AUTO"
        self.pixels = stream.width * stream.height

    def frames(self, indices: Sequence[int]) -> Iterator[Frame]:
        """See `Clip`."""
        wanted = iter(indices)
        index = next(wanted, None)
        for number, frame in enumerate(self._container.decode(self._stream)):
            if number != index:
                continue
            size = displayed(self._stream, frame)
            pixels = upright(frame.to_ndarray(format="rgb24"), orientation(frame))
            yield Frame(Image.fromarray(pixels), size)
            index = next(wanted, None)
            if index is None:
                return


class _InOrder:
    """What decord reads, one frame after the other."""

    def __init__(self, reader: Any, stream: VideoStream) -> None:
        self._reader = reader
        self.pixels = stream.width * stream.height

    def frames(self, indices: Sequence[int]) -> Iterator[Frame]:
        """See `Clip`."""
        wanted = set(indices)
        for number in range(min(indices[-1] + 1, len(self._reader)) if indices else 0):
            pixels = self._reader.next()
            if number in wanted:
                image = Image.fromarray(pixels.asnumpy())
                yield Frame(image, image.size)


def frame_count(image: Image.Image) -> int:
    """Frames of an animation; 1 for any other image, also one of several pages."""
    return int(getattr(image, "n_frames", 1)) if image.format in ANIMATED else 1
