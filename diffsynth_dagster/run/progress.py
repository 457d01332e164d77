"""How far a long piece of work is: a bar in a terminal, or a plain line now and then."""

import sys
import time
from typing import Protocol

from tqdm import tqdm

LINE_SECONDS, MOST_LINE_SECONDS = 5.0, 60.0
"""Between two lines of progress, at first and in a long training."""


class Every:
    """Says when progress is due: at its first part, at its last, and now and then between.

    Args:
        seconds: between two times.
        most: seconds up to which that grows in a long work, to a tenth of the time so far; it
            stays as it is when left out.
    """

    def __init__(self, seconds: float, most: float | None = None) -> None:
        self._seconds = seconds
        self._most = seconds if most is None else most
        self._began = time.monotonic()
        self._last: float | None = None

    def due(self, done: int, total: int) -> bool:
        """Whether to show that `done` of `total` is done; it counts as shown if so."""
        now = time.monotonic()
        pause = min(max(self._seconds, (now - self._began) / 10), self._most)
        if done < total and self._last is not None and now - self._last < pause:
            return False
        self._last = now
        return True


def every_line() -> Every:
    """When a line of progress is due in a log, which nobody wants to be full of them."""
    return Every(LINE_SECONDS, MOST_LINE_SECONDS)


class Progress(Protocol):
    """Shows how far a piece of work is."""

    def reached(self, done: int, facts: dict[str, str]) -> None:
        """`done` of the whole is done; `facts` are values to show beside it."""
        ...

    def close(self) -> None:
        """The work is over, or ended early."""
        ...


class ProgressBar:
    """A bar that is redrawn in place: for a terminal."""

    def __init__(self, title: str, total: int, unit: str) -> None:
        self._bar = tqdm(total=total, desc=title, unit=unit, dynamic_ncols=True)

    def reached(self, done: int, facts: dict[str, str]) -> None:
        """See `Progress`."""
        # Drawn with the next update: set_postfix would draw the bar for every step.
        self._bar.set_postfix(facts, refresh=False)
        self._bar.update(done - self._bar.n)

    def close(self) -> None:
        """See `Progress`."""
        self._bar.close()


class ProgressLines:
    """A plain line now and then: for a file or a pipe, where nothing can be redrawn."""

    def __init__(self, title: str, total: int, unit: str) -> None:
        self._title, self._total, self._unit = title, total, unit
        self._every = every_line()
        self._began = time.monotonic()

    def reached(self, done: int, facts: dict[str, str]) -> None:
        """See `Progress`."""
        if not self._every.due(done, self._total):
            return
        seconds = time.monotonic() - self._began
        left = tqdm.format_interval(seconds / max(done, 1) * (self._total - done))
        parts = [
            f"{self._title}: {self._unit} {done} of {self._total}",
            *(f"{name} {value}" for name, value in facts.items()),
            f"{tqdm.format_interval(seconds)} passed, {left} left",
        ]
        print(", ".join(parts), file=sys.stderr, flush=True)

    def close(self) -> None:
        """See `Progress`."""
