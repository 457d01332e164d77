"""Decodes whole videos in a process of its own, so that a damaged one can do no harm.

Run by its path, without the rest of the project: paths come in on standard input, a JSON text for
each line, and JSON objects go out: `{"decoded": n}` now and then as a sign of life, and at the end
`{"width", "height", "frames", "rate"}` or `{"error"}`. The decoder may crash or hang; whoever
started this process sees the former and ends the latter.
"""

import json
import os
import signal
import sys
import time

_SIGN_OF_LIFE_S = 1.0


def _stay_alive(patience_s: int) -> None:
    """End this process after so many seconds, also inside the decoder, unless called again.

    Zero seconds: however long it takes. Does nothing where there are no alarms.
    """
    if hasattr(signal, "alarm"):
        signal.alarm(patience_s)


def main(patience_s: int) -> None:
    """Serve until standard input ends."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    nothing = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 1)  # decoders write to these
    os.dup2(nothing, 2)

    def answer(value: dict[str, object]) -> None:
        _stay_alive(patience_s)
        answers.write(json.dumps(value) + "\n")
        answers.flush()

    import decord

    def decode(path: str) -> dict[str, object]:
        reader = decord.VideoReader(path, ctx=decord.cpu(0), num_threads=1)
        frames, shape, told = len(reader), (0, 0), time.monotonic()
        for index in range(frames):
            shape = reader.next().shape
            if time.monotonic() - told > _SIGN_OF_LIFE_S:
                told = time.monotonic()
                answer({"decoded": index + 1})
        rate = float(reader.get_avg_fps())
        return {"width": shape[1], "height": shape[0], "frames": frames, "rate": rate}

    for line in sys.stdin:
        found: dict[str, object]
        _stay_alive(patience_s)
        try:
            found = decode(json.loads(line))
        except Exception as error:  # noqa: BLE001 - the decoder raises anything
            found = {"error": str(error)}
        answer(found)
        _stay_alive(0)


if __name__ == "__main__":
    main(int(sys.argv[1]))
