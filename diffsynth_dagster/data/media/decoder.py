"""Decode whole videos, animations and sound in a process of its own, so that a damaged file can crash
nothing else.

This file is run as a script, without the rest of the project. It reads questions from standard
input, one JSON list `[kind, path]` a line; the kind is "video", "animation" or "audio". For each it
writes JSON objects to standard output, one a line: `{"decoded": n}` about once a second while it
decodes, and at the end what `DecoderPool.decode` says, or `{"error"}`. A decoder that hangs is ended
by an alarm; see `_end_in`.

What a video shows, and when, is what PyAV (that is, FFmpeg) decodes from its beginning to its end.
decord is faster than some, and counts packets instead of frames: it may leave frames out, repeat
them, and take no account of pixels that are not square. So it is asked beside PyAV, and trusted with
the files of which it gives the same frames, bit for bit.
"""

import json
import os
import signal
import struct
import sys
import time
from collections.abc import Callable, Sequence
from fractions import Fraction
from itertools import pairwise
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from av.video.frame import VideoFrame
    from av.video.stream import VideoStream
    from PIL.Image import Image

_PROGRESS_S = 1.0
_EXACT = ("flac", "ogg")
"""Formats that say exactly how long they are, and whose decoders skip what is damaged."""
_MISSING_S = 0.1
_NEAR_S = 1e-3
"""Time stamps are rounded to this much, or to the time base of their file where that is coarser."""
_SHORTEST_MS, _USUAL_MS = 10, 100
"""Frames of an animation that are to be shown for so long or shorter are shown by browsers for the
second time."""
_ORIENTATION = 0x0112
_STRIP = 1 << 20
"""Pixels that are looked at together."""
_HIGH_RANGE = {16: "PQ", 18: "HLG"}
"""Transfer functions of a high dynamic range, by their numbers in ITU-T H.273."""
Turn = tuple[tuple[int, int], tuple[int, int]]
"""((a, b), (c, d)), of 0, 1 and -1: a pixel at (x, y) is shown at (ax + cy, bx + dy)."""
UPRIGHT: Turn = ((1, 0), (0, 1))
"""Not turned."""


def _end_in(patience_s: int) -> None:
    """End this process in so many seconds, even inside the decoder, unless this is called again.

    Zero seconds: never. Does nothing on platforms without alarms.
    """
    if hasattr(signal, "alarm"):
        signal.alarm(patience_s)


def main(patience_s: int) -> None:
    """Serve until standard input ends."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    nothing = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 1)  # decoders print to these
    os.dup2(nothing, 2)

    def answer(value: dict[str, object]) -> None:
        _end_in(patience_s)
        answers.write(json.dumps(value) + "\n")
        answers.flush()

    reported = time.monotonic()

    def report(decoded: int) -> None:
        nonlocal reported
        if time.monotonic() - reported > _PROGRESS_S:
            reported = time.monotonic()
            answer({"decoded": decoded})

    decoders = {
        "video": _decode_video,
        "animation": _decode_animation,
        "audio": _decode_audio,
    }
    for line in sys.stdin:
        found: dict[str, object]
        _end_in(patience_s)
        try:
            kind, path = json.loads(line)
            found = decoders[kind](path, report)
        except Exception as error:  # noqa: BLE001 - the decoder raises anything
            found = {"error": str(error)}
        answer(found)
        _end_in(0)


def _decode_video(path: str, report: Callable[[int], None]) -> dict[str, object]:
    import av
    from av.video.stream import VideoStream

    with av.open(path, options={"protocol_whitelist": "file"}) as container:
        stream = container.streams.best("video")
        if not isinstance(stream, VideoStream):
            return {"error": "it has no video"}
        stream.codec_context.thread_count = 1
        beside, found = _Beside(path), dict[str, object]()
        stamps: list[int | None] = []
        last_s = 0.0
        for number, frame in enumerate(container.decode(stream), 1):
            # Such a frame holds what the decoder made up for data that it could not read. It is not told
            # to fail at every error (`err_detect=explode`): the first frames of a clip that was cut
            # without encoding it again may refer to ones that were left out, which is no damage.
            if frame.is_corrupt:
                return {"error": f"frame {number} is damaged"}
            if number == 1:
                turn = orientation(frame)
                width, height = displayed(stream, frame, turn)
                transfer = _HIGH_RANGE.get(int(frame.color_trc))
                found = {"width": width, "height": height, "transfer": transfer}
                if turn != UPRIGHT or (width, height) != (frame.width, frame.height):
                    beside.differs()
            stamps.append(frame.pts)
            last_s = float(frame.duration * (stream.time_base or 0)) if frame.duration else 0.0
            beside.compare(frame)
            report(number)
        rate, times = _timing(stream, stamps, last_s)
    decoder = "decord" if beside.gave(len(stamps)) else "pyav"
    return {**found, "frames": len(stamps), "rate": rate, "times": times, "decoder": decoder}


class _Beside:
    """decord, which decodes the same file frame by frame, as long as it gives the same frames."""

    def __init__(self, path: str) -> None:
        self._reader: Any = None
        self._frames = self._at = 0
        try:
            import decord

            self._reader = decord.VideoReader(path, ctx=decord.cpu(0), num_threads=1)
            self._frames = len(self._reader)
        except Exception:  # noqa: BLE001 - it is not installed, cannot read the file, or raises anything
            self._reader = None

    def differs(self) -> None:
        """Let it be: it does not give what is shown."""
        self._reader = None

    def compare(self, frame: "VideoFrame") -> None:
        """Compare its next frame with a frame."""
        if self._reader is None:
            return
        try:
            theirs = pixels_of(self._reader.next()) if self._at < self._frames else None
        except Exception:  # noqa: BLE001 - as above
            theirs = None
        self._at += 1
        ours = frame.to_ndarray(format="rgb24")
        if theirs is None or theirs.shape != ours.shape or not (theirs == ours).all():
            self._reader = None

    def gave(self, frames: int) -> bool:
        """Whether it gave all of so many frames, and no others."""
        return self._reader is not None and self._frames == frames


class _Shared:
    """An array of decord's for `numpy.from_dlpack`."""

    def __init__(self, array: Any) -> None:
        self._array = array

    def __dlpack__(self, **_: Any) -> Any:
        return self._array.to_dlpack()

    def __dlpack_device__(self) -> tuple[int, int]:
        return 1, 0  # the CPU


def pixels_of(array: Any) -> "np.ndarray":
    """The pixels (H, W, 3) of a frame of decord's, without a copy. (`asnumpy` copies them, and leaves
    them in memory until the garbage collector comes.)"""
    import numpy as np

    return np.from_dlpack(_Shared(array))


def displayed(stream: "VideoStream", frame: "VideoFrame", turn: Turn) -> tuple[int, int]:
    """(width, height) that a frame is shown at, upright and in square pixels.

    Pixels that are wider than high make the picture wider, others narrower: its height stays, before
    it is turned.
    """
    ratio = stream.sample_aspect_ratio or Fraction(1)
    width, height = max(1, round(frame.width * ratio)), frame.height
    return (width, height) if turn[0][0] else (height, width)


def orientation(frame: "VideoFrame") -> Turn:
    """How the frames of a video are turned or mirrored when they are shown: the right angles nearest to
    the display matrix of its first frame. (A frame that is asked for it stays in memory for long.)"""
    sides: Any = frame.side_data  # a mapping, by its types, that goes through its values
    for side in sides:
        if side.type.name != "DISPLAYMATRIX":
            continue
        a, b, _, c, d, *_ = struct.unpack("=9i", bytes(side))
        if a == b == c == d == 0:
            break
        if abs(a) + abs(d) >= abs(b) + abs(c):
            return (-1 if a < 0 else 1, 0), (0, -1 if d < 0 else 1)
        return (0, -1 if b < 0 else 1), (-1 if c < 0 else 1, 0)
    return UPRIGHT


def upright(pixels: "np.ndarray", turn: Turn) -> "np.ndarray":
    """The pixels (H, W, 3) of a frame as they are shown."""
    (a, b), (c, d) = turn
    if not a:
        pixels = pixels.swapaxes(0, 1)
    if a + c < 0:
        pixels = pixels[:, ::-1]
    if b + d < 0:
        pixels = pixels[::-1]
    return pixels


def _timing(
    stream: "VideoStream", stamps: Sequence[int | None], last_s: float
) -> tuple[float, list[int] | None]:
    """The frames per second of a video, and the times at which its frames are shown; see
    `DecoderPool.decode`.

    Args:
        stamps: of its frames, in units of the stream's time base; None where they have none.
        last_s: how long the last frame is shown; 0 where nothing says that.
    """
    base = float(stream.time_base or 0)
    said = [float(rate) for rate in (stream.average_rate, stream.guessed_rate) if rate]
    known = [stamp for stamp in stamps if stamp is not None]
    # Where stamps go back, as those of AVI do, or are missing, the file says a rate alone. Of a bare
    # stream of H.264 the first is not the file's, but what FFmpeg takes where nothing is said.
    if any(b < a for a, b in pairwise(known)):
        return (said[0] if said else 0.0), None
    if len(known) < len(stamps):
        return (said[-1] if said else 0.0), None
    times = [(stamp - known[0]) * base for stamp in known]
    own = [(len(times) - 1) / times[-1]] if times and times[-1] > 0 else []
    for rate in said + own:
        # A frame that is left out is no rounding, also where the unit is as long as a frame.
        if _is_even(times, 1 / rate, 1.01 * min(max(base, _NEAR_S), 0.25 / rate)):
            return rate, None
    if not own:
        return 0.0, None
    last_s = last_s or times[-1] - times[-2]
    return len(times) / (times[-1] + last_s), _in_microseconds([*times, times[-1] + last_s])


def _is_even(times: Sequence[float], gap: float, near: float) -> bool:
    """Whether frames are shown one gap after the other, but for rounding; all in the same unit."""
    return all(abs(time - index * gap) <= near for index, time in enumerate(times))


def _in_microseconds(times: Sequence[float]) -> list[int]:
    return [round(time * 1e6) for time in times]


def _decode_animation(path: str, report: Callable[[int], None]) -> dict[str, object]:
    from PIL import Image

    with Image.open(path) as image:
        # The picture for programs that show no animation is none of its frames.
        first = int(bool(getattr(image, "default_image", False)))
        times, transparent = [0], False
        for index in range(first, getattr(image, "n_frames", 1)):
            image.seek(index)
            image.load()
            shown_ms = image.info.get("duration", 0)
            times.append(times[-1] + (shown_ms if shown_ms > _SHORTEST_MS else _USUAL_MS))
            transparent = transparent or _shows_what_is_beneath(image)
            report(index)
        frames, length = len(times) - 1, times[-1]
        turned = image.getexif().get(_ORIENTATION, 1) >= 5
        width, height = image.size[::-1] if turned else image.size
    even = _is_even(times, length / frames, 1.0)
    return {
        "width": width,
        "height": height,
        "frames": frames,
        "rate": 1000 * frames / length if frames > 1 else None,
        "times": None if even else [1000 * time for time in times],
        "decoder": "pillow",
        "first": first,
        "transparent": transparent,
    }


def _shows_what_is_beneath(image: "Image") -> bool:
    """Whether a pixel of a decoded picture is not opaque: `colour.is_transparent`, which this script, being
    alone, cannot call."""
    if not image.has_transparency_data:
        return False
    height = max(1, _STRIP // image.width)
    tops = range(0, image.height, height)
    strips = (image.crop((0, t, image.width, min(t + height, image.height))) for t in tops)
    return any(
        strip.convert("RGBA").getchannel("A").histogram()[255] < strip.width * strip.height
        for strip in strips
    )


def _decode_audio(path: str, report: Callable[[int], None]) -> dict[str, object]:
    import av

    # A playlist must not make it ask the network.
    with av.open(path, options={"protocol_whitelist": "file"}) as container:
        tracks = len(container.streams.audio)
        if not tracks or not container.streams.audio[0].rate:
            return {"tracks": tracks, "channels": 0, "rate": 0, "seconds": 0.0}
        stream = container.streams.audio[0]
        stream.codec_context.options = {"err_detect": "crccheck+explode"}
        samples, rate, channels = 0, stream.rate, stream.channels
        for frame in container.decode(stream):
            samples += frame.samples
            # Some codecs say in the header half of what they decode to.
            rate, channels = frame.sample_rate, frame.layout.nb_channels
            report(samples)
        if not samples:
            return {"error": "it holds no samples"}
        seconds = samples / rate
        if container.format.name in _EXACT and stream.duration and stream.time_base:
            missing = float(stream.duration * stream.time_base) - seconds
            if missing > _MISSING_S:
                return {"error": f"{missing:.1f} s of it are missing or damaged"}
        return {"tracks": tracks, "channels": channels, "rate": rate, "seconds": seconds}


if __name__ == "__main__":
    main(int(sys.argv[1]))
