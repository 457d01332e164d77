"""Reads what a training says through Pipes."""

from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any

import dagster as dg

from diffsynth_dagster.run.events import Event, event_of

if TYPE_CHECKING:
    from dagster_pipes import PipesMessage, PipesParams


class MessageReader(dg.PipesFileMessageReader):
    """Hands out each event once. Dagster's own reader keeps all of a session and copies
    them whenever they are asked for, which a training of many steps would drown in.

    Args:
        path: the file that the training writes them into, as messages.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(str(path))
        self._queue: SimpleQueue[dict[str, Any]] = SimpleQueue()

    @property
    def expected_writer_count(self) -> int:
        """Only the main process of a training speaks."""
        return 1

    @contextmanager
    def read_messages(self, handler: Any) -> "Generator[PipesParams]":
        """Read into the queue what is ours; the rest is the handler's. (Called by Dagster.)"""
        sorter: Any = _Sorter(handler, self._queue)
        with super().read_messages(sorter) as params:
            yield params

    def new(self) -> Iterator[Event]:
        """The events that came in since the last call."""
        while True:
            try:
                message = self._queue.get_nowait()
            except Empty:
                return
            yield event_of(message)


class _Sorter:
    """Stands before Dagster's message handler."""

    def __init__(self, handler: Any, queue: "SimpleQueue[dict[str, Any]]") -> None:
        self._handler = handler
        self._queue = queue

    def handle_message(self, message: "PipesMessage") -> None:
        if message["method"] == "report_custom_message":
            self._queue.put((message["params"] or {})["payload"])
        else:
            self._handler.handle_message(message)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._handler, name)
