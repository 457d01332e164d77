"""Reporting the failure of this process, from before anything else is set up.

Nothing heavy is imported here, so that a failure to import something can be reported too.
"""

import contextlib
import faulthandler
import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import TextIO

from diffsynth_dagster.errors import EXIT_USER_ERROR, OutputError, Stopped, UserError
from diffsynth_dagster.files import write_text
from diffsynth_dagster.run.events import Event
from diffsynth_dagster.run.failure import (
    EXIT_STOPPED,
    FAILURE_FOLDER,
    Failure,
    failure_of,
    recognised,
    working_file,
)
from diffsynth_dagster.run.reporting import Reporter

EXIT_CRASHED = 1


class PrintedFailures(Reporter):
    """Prints what happened. (The traceback of a crash is printed by Python itself.)"""

    tells_crashes = False

    def report(self, event: Event) -> None:
        match event:
            case Failure(kind="mistake"):
                print(f"error: {event}", file=sys.stderr, flush=True)
            case Failure(kind="stopped"):
                print(event.what, file=sys.stderr, flush=True)
            case _:
                pass


class WrittenFailures(Reporter):
    """Writes what happened into a folder, for whoever launched this process."""

    tells_crashes = True

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._working: TextIO | None = None
        with contextlib.suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            self._working = working_file(folder).open("w")
            faulthandler.enable(self._working)

    def report(self, event: Event) -> None:
        if not isinstance(event, Failure):
            return
        path = self._folder / f"failure-{event.process}.json"
        try:
            write_text(path, json.dumps(asdict(event)))
        except OutputError:  # the disk is full: standard error is what is left
            PrintedFailures().report(event)
            if event.traceback is not None:
                print(event.traceback, file=sys.stderr, flush=True)

    def close(self) -> None:
        if self._working is not None:
            faulthandler.disable()
            self._working.close()
            working_file(self._folder).unlink(missing_ok=True)


def failure_reporter() -> PrintedFailures | WrittenFailures:
    """What reports the failure of this process, from before anything else is set up."""
    folder = os.environ.get(FAILURE_FOLDER)
    return WrittenFailures(Path(folder)) if folder else PrintedFailures()


class FailureGuard:
    """A block whose failure is reported; afterwards `code` is the exit code of the process.

    Mistakes and requests to stop end here; a crash that nobody else is told goes on to Python, which
    prints its traceback.
    """

    def __init__(self, reporter: PrintedFailures | WrittenFailures) -> None:
        self._reporter = reporter
        self.code = 0

    def __enter__(self) -> "FailureGuard":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> bool:
        try:
            if error is None or isinstance(error, SystemExit):
                return False
            error = recognised(error)
            self._reporter.report(failure_of(error))
            return self._ended_by(error)
        finally:
            self._reporter.close()

    def _ended_by(self, error: BaseException) -> bool:
        """Whether the error ends here."""
        if isinstance(error, UserError):
            self.code = EXIT_USER_ERROR
        elif isinstance(error, (Stopped, KeyboardInterrupt)):
            self.code = EXIT_STOPPED
        else:
            self.code = EXIT_CRASHED
        return (
            isinstance(error, (UserError, Stopped, KeyboardInterrupt))
            or self._reporter.tells_crashes
        )
