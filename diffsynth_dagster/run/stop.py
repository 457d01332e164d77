"""Stopping when SIGINT or SIGTERM comes: at once, or, where something is in the making, after it."""

import signal
from collections.abc import Callable, Generator
from contextlib import contextmanager
from types import FrameType

_blocks = 0
"""How many blocks of `finishing` run."""


@contextmanager
def finishing() -> Generator[None]:
    """While the block runs, a signal is only remembered: the block asks whether one came wherever it may
    end, between two steps or batches, and raises `Stopped`."""
    global _blocks
    _blocks += 1
    try:
        yield
    finally:
        _blocks -= 1


class StopSignal:
    """Stops the process by SIGINT or SIGTERM while it is entered.

    The first signal is a `KeyboardInterrupt` wherever the main thread is (reading a table, checking
    files, waiting for a lock, loading a model), but for blocks of `finishing`. A second one acts as if
    this were not here. Called, it returns whether one came.
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
        signal.signal(number, signal.SIG_DFL)
        if not _blocks:
            raise KeyboardInterrupt

    def __call__(self) -> bool:
        return self._asked
