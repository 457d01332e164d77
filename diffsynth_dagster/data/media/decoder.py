"""Decode whole videos, animations and sound in a separate process, which a damaged file may crash.

This file is run as a script, without the rest of the project. It reads requests from standard
input, one JSON list `[kind, path]` per line, where the kind is "video", "animation" or "audio". For
each request it writes JSON objects to standard output, one per line: `{"decoded": n}` about once a
second while it decodes, and finally the result that `DecoderPool.decode` describes, or `{"error"}`.
An alarm ends a decoder that hangs; see `_end_in`.

The frames of a video and their times are those that PyAV (FFmpeg) decodes from beginning to end.
decord reads many files faster, but it counts packets instead of frames: it may leave frames out,
repeat them, and ignore that pixels are not square. So decord decodes every file too, and is used
for the files for which it returns the same frames as PyAV, bit for bit.
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
"""Formats that state their exact duration, and whose decoders skip damaged parts silently."""
_MISSING_S = 0.1
"""Sound that is this much shorter than stated, in seconds, is damaged."""
_NEAR_S = 1e-3
"""Precision of time stamps in seconds. It is the time base of the file if that is coarser."""
_SHORTEST_MS, _USUAL_MS = 10, 100
"""Frames of an animation with a duration up to the first number are shown for the second one, as in
browsers."""
_ORIENTATION = 0x0112
"""The EXIF tag of the orientation."""
_STRIP = 1 << 20
"""Pixels that are checked at once, so that the check needs little memory."""
_SMALL_SIDE, _SMALLS = 32, 16
"""Pixels on a side of the small grey frames, of which about so many are kept for a file."""
_HIGH_RANGE = {16: "PQ", 18: "HLG"}
"""Transfer functions of a high dynamic range, by their numbers in ITU-T H.273."""
Turn = tuple[tuple[int, int], tuple[int, int]]
"""((a, b), (c, d)), each 0, 1 or -1: a pixel at (x, y) is displayed at (ax + cy, bx + dy)."""
UPRIGHT: Turn = ((1, 0), (0, 1))
"""The identity: neither rotated nor mirrored."""


def _end_in(patience_s: int) -> None:
    """End this process in `patience_s` seconds, unless this is called again; 0 cancels it.

    Does nothing on platforms without alarms.
    """
    # Nothing handles SIGALRM, so it kills the process even while a decoder's C code runs.
    if hasattr(signal, "alarm"):
        signal.alarm(patience_s)


def main(patience_s: int) -> None:
    """Answer requests until standard input ends."""
    # Decoders print to the standard streams. The answers get a descriptor of their own.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    nothing = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 1)
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
        except Exception as error:  # noqa: BLE001 - a decoder may raise anything
            found = {"error": str(error)}
        answer(found)
        _end_in(0)  # waiting for the next request may take any time


def _decode_video(path: str, report: Callable[[int], None]) -> dict[str, object]:
    import av
    from av.video.stream import VideoStream

    with av.open(path, options={"protocol_whitelist": "file"}) as container:
        stream = container.streams.best("video")
        if not isinstance(stream, VideoStream):
            return {"error": "it has no video"}
        stream.codec_context.thread_count = 1  # the pool runs one process for each core
        decord, smalls, found = _Decord(path), _SmallFrames(), dict[str, object]()
        turn = UPRIGHT
        stamps: list[int | None] = []
        last_s = 0.0
        for number, frame in enumerate(container.decode(stream), 1):
            # The decoder made up parts of this frame, because it could not read the data. We do not
            # set `err_detect=explode`, which fails at every error: in a clip that was cut without
            # re-encoding, the first frames may refer to frames that were cut off: no damage.
            if frame.is_corrupt:
                return {"error": f"frame {number} is damaged"}
            if number == 1:
                turn = orientation(frame)
                width, height = displayed(stream, frame, turn)
                transfer = _HIGH_RANGE.get(int(frame.color_trc))
                found = {"width": width, "height": height, "transfer": transfer}
                # These frames are turned or stretched after decoding, which decord does not do.
                if turn != UPRIGHT or (width, height) != (frame.width, frame.height):
                    decord.rule_out()
            stamps.append(frame.pts)
            last_s = float(frame.duration * (stream.time_base or 0)) if frame.duration else 0.0
            decord.compare(frame)
            smalls.add(frame)
            report(number)
        rate, times = _timing(stream, stamps, last_s)
    decoder = "decord" if decord.matched(len(stamps)) else "pyav"
    timed = {"frames": len(stamps), "rate": rate, "times": times}
    small = smalls.first_and_middle(turn) if stamps else ""
    return {**found, **timed, "decoder": decoder, "small": small}


class _SmallFrames:
    """Keeps some frames of a file of unknown length, evenly spaced: small, and in grey."""

    def __init__(self) -> None:
        self._kept: list[np.ndarray] = []
        self._seen, self._every = 0, 1

    def add(self, frame: "VideoFrame") -> None:
        """Look at the next frame."""
        if self._seen % self._every == 0:
            small = frame.reformat(_SMALL_SIDE, _SMALL_SIDE, "gray")
            self._kept.append(small.to_ndarray())
            if len(self._kept) > _SMALLS:
                self._kept, self._every = self._kept[::2], 2 * self._every
        self._seen += 1

    def first_and_middle(self, turn: Turn) -> str:
        """The first frame and one near the middle, upright and side by side: bytes (32, 64), row by
        row, in hexadecimal."""
        import numpy as np

        middle = self._kept[(self._seen - 1) // 2 // self._every]
        both = [upright(frame, turn) for frame in (self._kept[0], middle)]
        return np.hstack(both).tobytes().hex()


class _Decord:
    """Decodes the same file with decord and compares frame by frame, up to the first difference."""

    def __init__(self, path: str) -> None:
        self._reader: Any = None
        self._frames = self._at = 0
        try:
            import decord

            self._reader = decord.VideoReader(path, ctx=decord.cpu(0), num_threads=1)
            self._frames = len(self._reader)
        except Exception:  # noqa: BLE001 - not installed, cannot read the file, or anything else
            self._reader = None

    def rule_out(self) -> None:
        """Stop comparing: decord does not return the frames as they are displayed."""
        self._reader = None

    def compare(self, frame: "VideoFrame") -> None:
        """Compare decord's next frame with PyAV's."""
        if self._reader is None:
            return
        try:
            theirs = pixels_of(self._reader.next()) if self._at < self._frames else None
        except Exception:  # noqa: BLE001 - decord may raise anything
            theirs = None
        self._at += 1
        ours = frame.to_ndarray(format="rgb24")
        if theirs is None or theirs.shape != ours.shape or not (theirs == ours).all():
            self._reader = None

    def matched(self, frames: int) -> bool:
        """Whether decord returned exactly these `frames` frames, all equal to PyAV's."""
        return self._reader is not None and self._frames == frames


class _Shared:
    """Wraps an array of decord, which has only the old `to_dlpack`, for `numpy.from_dlpack`."""

    def __init__(self, array: Any) -> None:
        self._array = array

    def __dlpack__(self, **_: Any) -> Any:
        return self._array.to_dlpack()

    def __dlpack_device__(self) -> tuple[int, int]:
        return 1, 0  # the CPU


def pixels_of(array: Any) -> "np.ndarray":
    """The pixels (H, W, 3) of a frame of decord, without a copy."""
    import numpy as np

    # decord's own `asnumpy` copies, and its copy stays in memory until the garbage collector runs.
    return np.from_dlpack(_Shared(array))


def displayed(stream: "VideoStream", frame: "VideoFrame", turn: Turn) -> tuple[int, int]:
    """(width, height) at which a frame is displayed, upright and in square pixels.

    Pixels that are not square change the width. The height stays as it is, before the frame is
    turned.
    """
    ratio = stream.sample_aspect_ratio or Fraction(1)
    width, height = max(1, round(frame.width * ratio)), frame.height
    return (width, height) if turn[0][0] else (height, width)


def orientation(frame: "VideoFrame") -> Turn:
    """How players rotate or mirror a frame: its display matrix, rounded to multiples of 90 degrees.

    Ask only the first frame: a frame whose side data was read stays in memory for a long time.
    """
    # Typed as a mapping, but iterating over it gives the values.
    sides: Any = frame.side_data
    for side in sides:
        if side.type.name != "DISPLAYMATRIX":
            continue
        # A 3x3 matrix of 32-bit integers: (a, b, u, c, d, v, x, y, w).
        a, b, _, c, d, *_ = struct.unpack("=9i", bytes(side))
        if a == b == c == d == 0:  # meaningless, but found in files: FFmpeg ignores it too
            break
        # The larger diagonal decides between 0 or 180 degrees and 90 or 270 degrees.
        if abs(a) + abs(d) >= abs(b) + abs(c):
            return (-1 if a < 0 else 1, 0), (0, -1 if d < 0 else 1)
        return (0, -1 if b < 0 else 1), (-1 if c < 0 else 1, 0)
    return UPRIGHT


def upright(pixels: "np.ndarray", turn: Turn) -> "np.ndarray":
    """The pixels (H, W, 3) of a frame, rotated and mirrored as they are displayed."""
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
    """The frames per second of a video, and the times at which its frames are shown.

    Args:
        stamps: time stamps of the frames, in units of the stream's time base; None if missing.
        last_s: how long the last frame is shown, in seconds; 0 if unknown.

    Returns:
        (rate, times): see `DecoderPool.decode`.
    """
    base = float(stream.time_base or 0)
    stated = [float(rate) for rate in (stream.average_rate, stream.guessed_rate) if rate]
    known = [stamp for stamp in stamps if stamp is not None]
    # Time stamps that decrease, as in AVI files, or are missing cannot be used: all that is left is
    # the rate of the file. In a bare H.264 stream (no stamps), `average_rate` is not in the file
    # but a default of FFmpeg, so the guessed rate is used.
    if any(b < a for a, b in pairwise(known)):
        return (stated[0] if stated else 0.0), None
    if len(known) < len(stamps):
        return (stated[-1] if stated else 0.0), None
    times = [(stamp - known[0]) * base for stamp in known]
    measured = [(len(times) - 1) / times[-1]] if times and times[-1] > 0 else []
    for rate in stated + measured:
        # At most a quarter of a frame counts as rounding. So a missing frame is found even if the
        # time base is as long as a frame.
        if _is_even(times, 1 / rate, 1.01 * min(max(base, _NEAR_S), 0.25 / rate)):
            return rate, None
    if not measured:
        return 0.0, None
    last_s = last_s or times[-1] - times[-2]
    return len(times) / (times[-1] + last_s), _in_microseconds([*times, times[-1] + last_s])


def _is_even(times: Sequence[float], gap: float, near: float) -> bool:
    """Whether each time is a multiple of `gap`, apart from errors up to `near`; all in one unit."""
    return all(abs(time - index * gap) <= near for index, time in enumerate(times))


def _in_microseconds(times: Sequence[float]) -> list[int]:
    return [round(time * 1e6) for time in times]


def _decode_animation(path: str, report: Callable[[int], None]) -> dict[str, object]:
    from PIL import Image

    with Image.open(path) as image:
        # An APNG may have an extra picture for programs without animation. It comes first, and is
        # not part of the animation.
        first = int(bool(getattr(image, "default_image", False)))
        times, transparent = [0], False
        for index in range(first, getattr(image, "n_frames", 1)):
            image.seek(index)
            image.load()
            shown_ms = image.info.get("duration", 0)
            times.append(times[-1] + (shown_ms if shown_ms > _SHORTEST_MS else _USUAL_MS))
            transparent = transparent or _is_transparent(image)
            report(index)
        frames, length = len(times) - 1, times[-1]
        turned = image.getexif().get(_ORIENTATION, 1) >= 5  # by 90 or 270 degrees
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


def _is_transparent(image: "Image") -> bool:
    """Whether any pixel of a decoded picture is not opaque."""
    # The same as `colour.is_transparent`, which this script cannot import.
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

    # A playlist could name addresses in the network; FFmpeg must not open those.
    with av.open(path, options={"protocol_whitelist": "file"}) as container:
        tracks = len(container.streams.audio)
        if not tracks or not container.streams.audio[0].rate:
            return {"tracks": tracks, "channels": 0, "rate": 0, "seconds": 0.0}
        stream = container.streams.audio[0]
        # Fail at every error. By default, decoders skip or conceal damaged parts.
        stream.codec_context.options = {"err_detect": "crccheck+explode"}
        samples, rate, channels = 0, stream.rate, stream.channels
        for frame in container.decode(stream):
            samples += frame.samples
            # The decoded frames are right: the header of some codecs (HE-AAC) states half the rate
            # or half the channels.
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
