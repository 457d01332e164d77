"""Stop on SIGINT or SIGTERM: at once, or after the present training step or batch."""

import signal
from collections.abc import Callable, Generator
from contextlib import contextmanager
from types import FrameType

# Blocks of `finishing` that are running, one inside another. Global, as signal handlers are.
_blocks = 0


@contextmanager
def finishing() -> Generator[None]:
    """A block that a signal does not interrupt. The block must call `StopSignal` between two steps
    or batches, and raise `Stopped` if a signal has come."""
    global _blocks
    _blocks += 1
    try:
        yield
    finally:
        _blocks -= 1


class StopSignal:
    """A context in which SIGINT and SIGTERM stop the process. Called, it says if one came.

    The first signal raises `KeyboardInterrupt` in the main thread (while it reads a table, checks
    files, waits for a lock, or loads a model), except in a block of `finishing`. A second signal
    has its default effect and ends the process.
    """

    def __init__(self) -> None:
        self._asked = False
        self._before: dict[int, Callable[[int, FrameType | None], object] | int | None] = {}

    def __enter__(self) -> "StopSignal":
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._asked = True
        # A step may hang: the second signal must end the process.
        signal.signal(number, signal.SIG_DFL)
        if not _blocks:
            raise KeyboardInterrupt

    def __call__(self) -> bool:
        return self._asked
