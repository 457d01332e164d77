"""Processes that check videos, animations and sound by decoding them: see `decoder`."""

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
"""A decoder that reports no progress for so long is ended."""
_WORKER = Path(__file__).with_name("decoder.py")


class DecoderPool:
    """As many decoding processes as asked for, each started when it is first needed.

    `decode` may be called from any number of threads. Use as a context manager: when it is left, every
    process is ended, and calls that wait for one get an `error`.
    """

    def __init__(self, processes: int | None = None, patience_s: int = PATIENCE_S) -> None:
        self._patience_s = patience_s
        self._idle: queue.LifoQueue[subprocess.Popen[str] | None] = queue.LifoQueue()
        for _ in range(processes or os.cpu_count() or 1):
            self._idle.put(None)
        self._running: set[subprocess.Popen[str]] = set()
        self._left = False

    def decode(self, path: Path, kind: str = "video") -> dict[str, Any]:
        """Decode every frame of a video or animation, or all of the sound of a file.

        Args:
            kind: "video" for what FFmpeg reads, "animation" for what Pillow does, or "audio".

        Returns:
            For a video or animation `width` and `height` in pixels as it is shown, `frames`, `rate` in
            frames per second (None for an animation of one frame), `times` and `decoder`. The times
            are None where the frames are shown evenly, and else the microseconds at which each is
            shown, counted from the first, and at which the last one ends. The decoder is who gives the
            frames that are shown: "pillow", "decord" (in order, from the beginning), or "pyav" alone.
            For a video also `transfer`, "PQ" or "HLG" where its range is high, and for an animation
            `first`, the number of its first frame in the file, and whether pixels are `transparent`.
            For sound `tracks`, and of the first `channels`, `rate` in samples of each per second, and
            `seconds`. Or `error`.
        """
        worker = self._idle.get() or self._start()
        try:
            found, worker = self._ask(worker, [kind, str(path)])
        finally:
            self._idle.put(worker if worker is not None and worker.poll() is None else None)
        return found

    def _start(self) -> subprocess.Popen[str]:
        # -P keeps the worker's folder off the path: its neighbours are not its modules.
        worker = subprocess.Popen(
            [sys.executable, "-P", str(_WORKER), str(self._patience_s)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            encoding="utf-8",
        )
        self._running.add(worker)
        if self._left:  # meanwhile, by a thread that was interrupted
            self._end(worker)
        return worker

    def _ask(
        self, worker: subprocess.Popen[str], question: list[str]
    ) -> tuple[dict[str, Any], subprocess.Popen[str] | None]:
        """The worker's answer, and the worker; None if it has ended."""
        assert worker.stdin is not None
        assert worker.stdout is not None
        try:
            worker.stdin.write(json.dumps(question) + "\n")
            worker.stdin.flush()
        except OSError:
            self._end(worker)
            return {"error": "the decoder ended"}, None
        while True:
            # The worker ends itself; this is for platforms where it cannot.
            timer = Timer(self._patience_s + 5, worker.kill)
            timer.daemon = True
            timer.start()
            line = worker.stdout.readline()
            timer.cancel()
            if not line.endswith("\n"):
                code = worker.wait()
                why = "gave no sign of life" if code in (-14, -9) else "crashed"
                self._end(worker)
                return {"error": f"the decoder {why}"}, None
            answer: dict[str, Any] = json.loads(line)
            if "decoded" not in answer:
                return answer, worker

    def __enter__(self) -> "DecoderPool":
        return self

    def __exit__(self, *_: object) -> None:
        # Also those that decode: whoever was interrupted does not wait for the end of a clip.
        self._left = True
        for worker in [*self._running]:
            self._end(worker)

    def _end(self, worker: subprocess.Popen[str]) -> None:
        worker.kill()
        worker.wait()
        self._running.discard(worker)
        for pipe in (worker.stdin, worker.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):  # what was left to write has no reader
                    pipe.close()
