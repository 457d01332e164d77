"""A pool of processes that check videos, animations and sound by decoding them: see `decoder`."""

import contextlib
import json
import os
import queue
import subprocess
import sys
from pathlib import Path
from threading import Timer
from typing import Any

PATIENCE_S = 60
"""A decoder that reports no progress for this many seconds is ended."""
_WORKER = Path(__file__).with_name("decoder.py")


class DecoderPool:
    """Decoding processes, each started when it is first needed.

    `decode` is thread-safe. Use the pool as a context manager: at its end every process is killed,
    and calls that still wait for one return an `error`.

    Args:
        processes: the most that run at the same time; one for each core if left out.
        patience_s: see `PATIENCE_S`.
    """

    def __init__(self, processes: int | None = None, patience_s: int = PATIENCE_S) -> None:
        self._patience_s = patience_s
        # None stands for a process that is not started yet. Last in, first out: no more processes
        # are started than are busy at the same time.
        self._idle: queue.LifoQueue[subprocess.Popen[str] | None] = queue.LifoQueue()
        for _ in range(processes or os.cpu_count() or 1):
            self._idle.put(None)
        self._running: set[subprocess.Popen[str]] = set()
        self._left = False

    def decode(self, path: Path, kind: str = "video") -> dict[str, Any]:
        """Decode every frame of a video or animation, or all of the sound of a file.

        Args:
            kind: "video" for files that FFmpeg reads, "animation" for files that Pillow reads, or
                "audio".

        Returns:
            `error`, a message, if the file cannot be decoded. Otherwise, for a video or animation:

            - `width` and `height` in pixels, as it is displayed;
            - `frames`, the number of frames;
            - `rate` in frames per second; None for an animation of one frame;
            - `times`: None if the frames are evenly spaced, else the microseconds at which each
              frame is shown, counted from the first, followed by the end of the last frame;
            - `decoder`, which library must read the frames: "pillow", "decord" (which works if
              frames are read in order from the beginning) or "pyav";
            - for a video `transfer`: "PQ" or "HLG" for high dynamic range, else None; and `small`,
              two frames of 32 x 32 grey pixels side by side (32, 64), in hexadecimal;
            - for an animation `first`, the number of its first frame in the file, and
              `transparent`, whether any pixel is not opaque.

            For sound: `tracks`, and of the first track `channels`, `rate` in samples per second of
            each channel, and `seconds`.
        """
        worker = self._idle.get() or self._start()
        try:
            found, worker = self._ask(worker, [kind, str(path)])
        finally:
            # In place of a process that ended, a new one will be started.
            self._idle.put(worker if worker is not None and worker.poll() is None else None)
        return found

    def _start(self) -> subprocess.Popen[str]:
        # -P keeps the folder of the script out of `sys.path`: the modules beside it could hide
        # others of the same name.
        worker = subprocess.Popen(
            [sys.executable, "-P", str(_WORKER), str(self._patience_s)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            encoding="utf-8",
        )
        self._running.add(worker)
        # Another thread may have closed the pool before this process was in `_running`.
        if self._left:
            self._end(worker)
        return worker

    def _ask(
        self, worker: subprocess.Popen[str], question: list[str]
    ) -> tuple[dict[str, Any], subprocess.Popen[str] | None]:
        """Send a request to a worker; returns its answer, and the worker or None if it ended."""
        assert worker.stdin is not None
        assert worker.stdout is not None
        try:
            worker.stdin.write(json.dumps(question) + "\n")
            worker.stdin.flush()
        except OSError:
            self._end(worker)
            return {"error": "the decoder ended"}, None
        while True:
            # The worker ends itself by an alarm. The timer is for platforms without alarms.
            timer = Timer(self._patience_s + 5, worker.kill)
            timer.daemon = True
            timer.start()
            line = worker.stdout.readline()
            timer.cancel()
            if not line.endswith("\n"):  # the pipe was closed
                code = worker.wait()
                # SIGALRM and SIGKILL: it was ended for lack of progress.
                why = "gave no sign of life" if code in (-14, -9) else "crashed"
                self._end(worker)
                return {"error": f"the decoder {why}"}, None
            answer: dict[str, Any] = json.loads(line)
            if "decoded" not in answer:
                return answer, worker

    def __enter__(self) -> "DecoderPool":
        return self

    def __exit__(self, *_: object) -> None:
        # Kill busy processes too: after Ctrl+C nobody wants to wait for the end of a clip.
        self._left = True
        for worker in [*self._running]:
            self._end(worker)

    def _end(self, worker: subprocess.Popen[str]) -> None:
        worker.kill()
        worker.wait()
        self._running.discard(worker)
        for pipe in (worker.stdin, worker.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):  # closing flushes into a pipe without reader
                    pipe.close()
