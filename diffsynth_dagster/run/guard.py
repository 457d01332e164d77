"""Report the failure of this process, whenever it happens.

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
    """Prints a failure. Python itself prints the traceback of a crash."""

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
    """Writes a failure into a folder, from which the launcher of this process reads it."""

    tells_crashes = True

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._working: TextIO | None = None
        # If the folder cannot be written, the process works without it.
        with contextlib.suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            self._working = working_file(folder).open("w")
            # A segmentation fault ends the process without an exception: this writes the stack.
            faulthandler.enable(self._working)

    def report(self, event: Event) -> None:
        if not isinstance(event, Failure):
            return
        path = self._folder / f"failure-{event.process}.json"
        try:
            write_text(path, json.dumps(asdict(event)))
        except OutputError:  # the disk may be full: only standard error is left
            PrintedFailures().report(event)
            if event.traceback is not None:
                print(event.traceback, file=sys.stderr, flush=True)

    def close(self) -> None:
        if self._working is not None:
            # The file is removed only here: if it is still there, the process was killed.
            faulthandler.disable()
            self._working.close()
            working_file(self._folder).unlink(missing_ok=True)


def failure_reporter() -> PrintedFailures | WrittenFailures:
    """The reporter for this process: it writes files if the launcher named a folder for them."""
    folder = os.environ.get(FAILURE_FOLDER)
    return WrittenFailures(Path(folder)) if folder else PrintedFailures()


class FailureGuard:
    """A block whose failure is reported. After it, `code` is the exit code for the process.

    A mistake of the user and a request to stop end here, without a traceback. A crash that is only
    printed is raised further, so that Python prints its traceback.
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
            if error is None or isinstance(error, SystemExit):  # argparse has printed its message
                return False
            error = recognised(error)
            self._reporter.report(failure_of(error))
            return self._ended_by(error)
        finally:
            self._reporter.close()

    def _ended_by(self, error: BaseException) -> bool:
        """Set the exit code. Returns whether the error ends here."""
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
