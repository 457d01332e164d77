"""Decode whole videos in a process of its own, so that a damaged one can crash nothing else.

This file is run as a script, without the rest of the project. It reads paths from standard input,
one JSON string a line. For each it writes JSON objects to standard output, one a line:
`{"decoded": n}` about once a second while it decodes, and at the end `{"width", "height", "frames",
"rate"}` or `{"error"}`. A decoder that hangs is ended by an alarm; see `_end_in`.
"""

import json
import os
import signal
import sys
import time

_PROGRESS_S = 1.0


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

    import decord

    def decode(path: str) -> dict[str, object]:
        reader = decord.VideoReader(path, ctx=decord.cpu(0), num_threads=1)
        frames, shape, reported = len(reader), (0, 0), time.monotonic()
        for index in range(frames):
            shape = reader.next().shape
            if time.monotonic() - reported > _PROGRESS_S:
                reported = time.monotonic()
                answer({"decoded": index + 1})
        rate = float(reader.get_avg_fps())
        return {"width": shape[1], "height": shape[0], "frames": frames, "rate": rate}

    for line in sys.stdin:
        found: dict[str, object]
        _end_in(patience_s)
        try:
            found = decode(json.loads(line))
        except Exception as error:  # noqa: BLE001 - the decoder raises anything
            found = {"error": str(error)}
        answer(found)
        _end_in(0)


if __name__ == "__main__":
    main(int(sys.argv[1]))
