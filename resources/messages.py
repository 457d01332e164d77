"""Reads what a training says through Pipes, whatever way its messages come."""

import json
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Event as Flag
from threading import Thread
from typing import TYPE_CHECKING, Any

import dagster as dg
from dagster_pipes import PipesDefaultMessageWriter

from diffsynth_dagster.run.events import Event, Warned, event_of

if TYPE_CHECKING:
    from dagster_pipes import PipesMessage, PipesOpenedData, PipesParams

_LOOK_EVERY_S = 0.05


class FileMessages(dg.PipesMessageReader):
    """Messages that come through a file, a line each.

    Dagster's own reader takes a line that is still being written for a whole one, and ends there: of a
    training that reports thousands of steps nothing would be heard from then on.

    Args:
        path: the file, which is removed at the end.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    @contextmanager
    def read_messages(self, handler: Any) -> "Generator[PipesParams]":
        """Read in a thread until all is read that was written. (Called by Dagster.)"""
        self._path.write_bytes(b"")
        over = Flag()
        thread = Thread(target=self._read, args=(handler, over), daemon=True)
        thread.start()
        try:
            yield {
                PipesDefaultMessageWriter.FILE_PATH_KEY: str(self._path),
                PipesDefaultMessageWriter.INCLUDE_STDIO_IN_MESSAGES_KEY: False,
            }
        finally:
            over.set()
            thread.join()
            self._path.unlink(missing_ok=True)

    def no_messages_debug_text(self) -> str:
        """(Called by Dagster.)"""
        return f"Attempted to read messages from file {self._path}."

    def _read(self, handler: Any, over: Flag) -> None:
        line = b""
        with self._path.open("rb") as file:
            while True:
                last = over.is_set()
                while part := file.readline():
                    line += part
                    if line.endswith(b"\n"):  # else the rest of it is still to come
                        handler.handle_message(json.loads(line))
                        line = b""
                if last:
                    return
                over.wait(_LOOK_EVERY_S)


class MessageReader(dg.PipesMessageReader):
    """Hands out each event once. Dagster's own readers keep all of a session and copy
    them whenever they are asked for, which a training of many steps would drown in.

    Args:
        reader: how the messages come: through a file, a bucket, the log of a job on a cluster.
    """

    def __init__(self, reader: dg.PipesMessageReader) -> None:
        self._reader = reader
        self._queue: SimpleQueue[dict[str, Any]] = SimpleQueue()

    @property
    def expected_writer_count(self) -> int:
        """Only the main process of a training speaks."""
        return 1

    @contextmanager
    def read_messages(self, handler: Any) -> "Generator[PipesParams]":
        """Read into the queue what is ours; the rest is the handler's. (Called by Dagster.)"""
        sorter: Any = _Sorter(handler, self._queue)
        with self._reader.read_messages(sorter) as params:
            yield params

    def on_opened(self, opened_payload: "PipesOpenedData") -> None:
        """(Called by Dagster.)"""
        self._reader.on_opened(opened_payload)

    def on_launched(self, launched_payload: Any) -> None:
        """(Called by Dagster.)"""
        self._reader.on_launched(launched_payload)

    def no_messages_debug_text(self) -> str:
        """(Called by Dagster.)"""
        return self._reader.no_messages_debug_text()

    def new(self) -> Iterator[Event]:
        """The events that came in since the last call."""
        while True:
            try:
                message = self._queue.get_nowait()
            except Empty:
                return
            yield event_of(message)


def told(context: dg.AssetExecutionContext, reader: MessageReader) -> Iterator[Event]:
    """What the processes said since the last time; their warnings go into the run's log."""
    for event in reader.new():
        if isinstance(event, Warned):
            context.log.warning(event.text)
        else:
            yield event


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
