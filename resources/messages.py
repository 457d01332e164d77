"""Reads the events of a training from Dagster Pipes, through a file or any other channel."""

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
    """Reads messages from a file, one on each line.

    Dagster's own reader of files takes a half-written line for a whole message and stops reading
    there. A training that reports thousands of steps runs into that sooner or later.

    Args:
        path: the file. It is made at the start and removed at the end.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    @contextmanager
    def read_messages(self, handler: Any) -> "Generator[PipesParams]":
        """Read in a thread while the block runs, and the rest at its end. (Called by Dagster.)"""
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
                # Checked before reading, so that all that was written until `over` was set is read.
                last = over.is_set()
                while part := file.readline():
                    line += part
                    if line.endswith(b"\n"):  # else the writer has not finished this line
                        handler.handle_message(json.loads(line))
                        line = b""
                if last:
                    return
                over.wait(_LOOK_EVERY_S)


class MessageReader(dg.PipesMessageReader):
    """Wraps a reader of messages and hands out each event of the training once.

    Dagster keeps all custom messages of a session and copies the whole list each time it is asked
    for them. With many thousand steps that takes more and more time.

    Args:
        reader: reads the messages from a file, a bucket, or the log of a job on a cluster.
    """

    def __init__(self, reader: dg.PipesMessageReader) -> None:
        self._reader = reader
        self._queue: SimpleQueue[dict[str, Any]] = SimpleQueue()

    @property
    def expected_writer_count(self) -> int:
        """One: only the main process of a training opens Pipes."""
        return 1

    @contextmanager
    def read_messages(self, handler: Any) -> "Generator[PipesParams]":
        """Put our events into the queue; all other messages go to Dagster. (Called by Dagster.)"""
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
        """The events that arrived since the last call."""
        while True:
            try:
                message = self._queue.get_nowait()
            except Empty:
                return
            yield event_of(message)


def told(context: dg.AssetExecutionContext, reader: MessageReader) -> Iterator[Event]:
    """The new events of the processes. Warnings are not yielded but logged in the run."""
    for event in reader.new():
        if isinstance(event, Warned):
            context.log.warning(event.text)
        else:
            yield event


class _Sorter:
    """Dagster's message handler, except that custom messages go into a queue."""

    def __init__(self, handler: Any, queue: "SimpleQueue[dict[str, Any]]") -> None:
        self._handler = handler
        self._queue = queue

    def handle_message(self, message: "PipesMessage") -> None:
        if message["method"] == "report_custom_message":
            self._queue.put((message["params"] or {})["payload"])
        else:
            self._handler.handle_message(message)

    def __getattr__(self, name: str) -> Any:
        # Dagster also calls other methods of its handler, such as those that report exceptions.
        return getattr(self._handler, name)
