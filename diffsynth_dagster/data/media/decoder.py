"""Decode whole videos and sound in a process of its own, so that a damaged file can crash nothing
else.

This file is run as a script, without the rest of the project. It reads questions from standard
input, one JSON list `["video" or "audio", path]` a line. For each it writes JSON objects to standard
output, one a line: `{"decoded": n}` about once a second while it decodes, and at the end `{"width",
"height", "frames", "rate"}` for a video, `{"tracks", "channels", "rate", "seconds"}` for sound, or
`{"error"}`. A decoder that hangs is ended by an alarm; see `_end_in`.
"""

import json
import os
import signal
import sys
import time
from collections.abc import Callable

_PROGRESS_S = 1.0
_EXACT = ("flac", "ogg")
"""Formats that say exactly how long they are, and whose decoders skip what is damaged."""
_MISSING_S = 0.1


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

    decoders = {"video": _decode_video, "audio": _decode_audio}
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
    import decord

    reader = decord.VideoReader(path, ctx=decord.cpu(0), num_threads=1)
    frames, shape = len(reader), (0, 0)
    for index in range(frames):
        shape = reader.next().shape
        report(index + 1)
    rate = float(reader.get_avg_fps())
    del reader
    damaged = _damaged_frame(path, report)
    if damaged is not None:
        return {"error": f"frame {damaged} is damaged"}
    return {"width": shape[1], "height": shape[0], "frames": frames, "rate": rate}


def _damaged_frame(path: str, report: Callable[[int], None]) -> int | None:
    """The first frame (from 1) that holds what the decoder made up for data that it could not read.

    Decord shows such frames as if they were sound. Decoders know them by codes that mean nothing,
    so how many they find depends on the codec. They are not told to fail at every error
    (`err_detect=explode`): the first frames of a clip that was cut without encoding it again may
    refer to ones that were left out, which is no damage.
    """
    import av
    from av.video.stream import VideoStream

    with av.open(path, options={"protocol_whitelist": "file"}) as container:
        stream = container.streams.best("video")
        if not isinstance(stream, VideoStream):
            return None
        stream.codec_context.thread_count = 1
        for number, frame in enumerate(container.decode(stream), 1):
            if frame.is_corrupt:
                return number
            report(number)
    return None


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
