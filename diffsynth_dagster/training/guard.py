"""Reporting the failure of this process, from before anything else is set up.

Nothing heavy is imported here, so that a failure to import something can be reported too.
"""

import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from types import TracebackType

from diffsynth_dagster.disk import disk_error
from diffsynth_dagster.errors import EXIT_USER_ERROR, OutputError, Stopped, UserError
from diffsynth_dagster.files import write_text
from diffsynth_dagster.training.failure import EXIT_STOPPED, FAILURE_FOLDER, Failure, failure_of
from diffsynth_dagster.training.reporting import Reporter
from diffsynth_dagster.training.shortage import out_of_memory


class PrintedFailures(Reporter):
    """Prints what happened. (The traceback of a crash is printed by Python itself.)"""

    def failed(self, failure: Failure) -> None:
        if failure.kind == "mistake":
            print(f"error: {failure}", file=sys.stderr, flush=True)
        elif failure.kind == "stopped":
            print(failure.what, file=sys.stderr, flush=True)


class WrittenFailures(Reporter):
    """Writes what happened into a folder, for whoever launched this process."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def failed(self, failure: Failure) -> None:
        path = self._folder / f"failure-{failure.process}.json"
        try:
            write_text(path, json.dumps(asdict(failure)))
        except OutputError:  # the disk is full: standard error is what is left
            PrintedFailures().failed(failure)


def failure_reporter() -> Reporter:
    """What reports the failure of this process, from before anything else is set up."""
    folder = os.environ.get(FAILURE_FOLDER)
    return WrittenFailures(Path(folder)) if folder else PrintedFailures()


class FailureGuard:
    """A block whose failure is reported; afterwards `code` is the exit code of the process.

    Mistakes and requests to stop end here; a crash goes on to Python, which prints its traceback.
    """

    def __init__(self, reporter: Reporter) -> None:
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
        if error is None or isinstance(error, SystemExit):
            return False
        error = disk_error(error) or out_of_memory(error) or error
        self._reporter.failed(failure_of(error))
        self.code = EXIT_USER_ERROR if isinstance(error, UserError) else EXIT_STOPPED
        return isinstance(error, (UserError, Stopped, KeyboardInterrupt))
