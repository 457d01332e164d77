"""Show the progress of long work: a bar in a terminal, else a plain line now and then."""

import sys
import time
from typing import Protocol

from tqdm import tqdm

LINE_SECONDS, MOST_LINE_SECONDS = 5.0, 60.0
"""Seconds between two lines of progress: at first, and at most in a long training."""


class Throttle:
    """Decides when progress is shown: for the first item, for the last, and at intervals in
    between.

    Args:
        seconds: the shortest interval.
        most: upper bound of the interval in seconds, which grows to a tenth of the elapsed time.
            None: the interval does not grow.
    """

    def __init__(self, seconds: float, most: float | None = None) -> None:
        self._seconds = seconds
        self._most = seconds if most is None else most
        self._began = time.monotonic()
        self._last: float | None = None

    def due(self, done: int, total: int) -> bool:
        """Whether to show now that `done` of `total` is done. If so, it counts as shown."""
        now = time.monotonic()
        pause = min(max(self._seconds, (now - self._began) / 10), self._most)
        if done < total and self._last is not None and now - self._last < pause:
            return False
        self._last = now
        return True


def every_line() -> Throttle:
    """The interval of progress lines in a log: it grows, so that they do not fill the log."""
    return Throttle(LINE_SECONDS, MOST_LINE_SECONDS)


class Progress(Protocol):
    """Shows the progress of some work."""

    def reached(self, done: int, facts: dict[str, str]) -> None:
        """Show that `done` items are done, with `facts` (name → value) beside that."""
        ...

    def close(self) -> None:
        """The work is finished, or ended early."""
        ...


class ProgressBar:
    """A bar that is redrawn in place, for a terminal.

    Args:
        first: how many items were done before; they took none of the time that is shown.
    """

    def __init__(self, title: str, total: int, unit: str, first: int = 0) -> None:
        self._bar = tqdm(total=total, initial=first, desc=title, unit=unit, dynamic_ncols=True)

    def reached(self, done: int, facts: dict[str, str]) -> None:
        """See `Progress`."""
        # refresh=False: update() draws at intervals, set_postfix would draw the bar for every step.
        self._bar.set_postfix(facts, refresh=False)
        self._bar.update(done - self._bar.n)

    def close(self) -> None:
        """See `Progress`."""
        self._bar.close()


class ProgressLines:
    """A plain line now and then, for a file or a pipe, where nothing can be redrawn.

    Args:
        first: see `ProgressBar`.
    """

    def __init__(self, title: str, total: int, unit: str, first: int = 0) -> None:
        self._title, self._total, self._unit, self._first = title, total, unit, first
        self._every = every_line()
        self._began = time.monotonic()

    def reached(self, done: int, facts: dict[str, str]) -> None:
        """See `Progress`."""
        if not self._every.due(done, self._total):
            return
        seconds = time.monotonic() - self._began
        # Assumes that the remaining items take as long as those so far.
        each = seconds / max(done - self._first, 1)
        left = tqdm.format_interval(each * (self._total - done))
        parts = [
            f"{self._title}: {self._unit} {done} of {self._total}",
            *(f"{name} {value}" for name, value in facts.items()),
            f"{tqdm.format_interval(seconds)} passed, {left} left",
        ]
        print(", ".join(parts), file=sys.stderr, flush=True)

    def close(self) -> None:
        """See `Progress`."""
