"""The logger of runs, which prints one short line for each event that a person wants to see.

The whole log of the run is kept by Dagster.
"""

import logging
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import dagster as dg

from resources.failing import Cancelled
from resources.keys import LOGGER

_WIDTH = 110
_MOST_LINES = 2
_LONGEST_TEXT = 60
_REMARKS = ("[pipes]", "Dependencies for step ")
"""Beginnings of log lines by Dagster itself that are not printed: about the channel to the training
processes, and about each step that is skipped after a failure."""

JOB_CONFIG = {"loggers": {LOGGER: {}}}
"""Run config with which a job uses our logger. Without it Dagster uses its own."""


class ConsoleHandler(logging.Handler):
    """Prints the events and log lines of one run to standard error.

    Args:
        names: step name → asset name.
        least: lowest level of log lines that are printed. (Events are printed at any level.)
    """

    def __init__(self, names: Mapping[str, str], least: int) -> None:
        super().__init__()
        self._names = names
        self._least = least
        self._began = time.monotonic()
        self._made: list[str] = []
        self._failed: list[str] = []
        self._passed_checks = 0
        self._result = ""
        self._printers: dict[dg.DagsterEventType, Callable[[dg.DagsterEvent], Iterator[str]]] = {
            dg.DagsterEventType.RUN_START: self._run_start,
            dg.DagsterEventType.ASSET_MATERIALIZATION: self._materialization,
            dg.DagsterEventType.ASSET_CHECK_EVALUATION: self._check,
            dg.DagsterEventType.STEP_FAILURE: self._step_failure,
            dg.DagsterEventType.STEP_UP_FOR_RETRY: self._retry,
            dg.DagsterEventType.RUN_SUCCESS: self._run_success,
            dg.DagsterEventType.RUN_FAILURE: self._run_failure,
            dg.DagsterEventType.RUN_CANCELED: self._run_canceled,
        }

    def emit(self, record: logging.LogRecord) -> None:
        """Print a record, if a person wants to see it. (Called by Dagster.)"""
        try:
            # Dagster puts what it knows of a log line here; it has no public name.
            for line in self._lines(record, record.__dict__["dagster_meta"]):
                sys.stderr.write(f"{line}\n")
        except Exception:  # noqa: BLE001 - an exception in a logger would fail the run
            self.handleError(record)

    def _lines(self, record: logging.LogRecord, about: Mapping[str, Any]) -> Iterator[str]:
        event: dg.DagsterEvent | None = about["dagster_event"]
        if event is not None:
            printer = self._printers.get(event.event_type)
            if printer is not None:
                yield from printer(event)
        elif record.levelno >= self._least and not about["orig_message"].startswith(_REMARKS):
            name = self._asset(about["step_key"]) if about["step_key"] else about["job_name"]
            level = "" if record.levelno < logging.WARNING else f"{record.levelname.lower()}: "
            yield f"{name}: {level}{about['orig_message']}"

    def _asset(self, step: str | None) -> str:
        return self._names.get(step or "", step or "")

    def _run_start(self, event: dg.DagsterEvent) -> Iterator[str]:
        self._began = time.monotonic()
        yield f"{event.job_name}: started"

    def _materialization(self, event: dg.DagsterEvent) -> Iterator[str]:
        asset = event.step_materialization_data.materialization
        name = asset.asset_key.to_user_string()
        self._made.append(name)
        # The paths of the last asset are printed at the end: that is what the run was for.
        paths = [v.path for v in asset.metadata.values() if isinstance(v, dg.PathMetadataValue)]
        self._result = f"{name}: {', '.join(filter(None, paths))}" if paths else ""
        facts = [
            f"{key.removeprefix('dagster/')} {text}"
            for key, value in asset.metadata.items()
            if (text := _short(value)) is not None
        ]
        yield textwrap.fill(
            ": ".join(filter(None, [name, "done", ", ".join(facts)])),
            _WIDTH,
            subsequent_indent="  ",
            break_long_words=False,
            break_on_hyphens=False,
            max_lines=_MOST_LINES,
            placeholder=" …",
        )

    def _check(self, event: dg.DagsterEvent) -> Iterator[str]:
        check = event.asset_check_evaluation_data
        if check.passed:
            self._passed_checks += 1
        elif not check.blocking:  # a blocking check fails its step, which prints the same text
            name = f"{check.asset_key.to_user_string()}: check {check.check_name}"
            yield f"{name} failed: {check.description or ''}"

    def _step_failure(self, event: dg.DagsterEvent) -> Iterator[str]:
        name, data = self._asset(event.step_key), event.step_failure_data
        self._failed.append(name)
        error = data.error
        if error is None or error.cls_name == Cancelled.__name__:
            return
        # Not an error of `resources.failing`: Dagster wrapped it, and the wrapper says no reason.
        if data.user_failure_data is None:
            error = _root(error)
        yield f"{name}: failed: {error.message.strip()}"
        yield from (part.rstrip() for part in error.stack)

    def _retry(self, event: dg.DagsterEvent) -> Iterator[str]:
        seconds = event.step_retry_data.seconds_to_wait or 0
        why = _root(event.step_retry_data.error).message.strip()
        yield f"{self._asset(event.step_key)}: tried again in {seconds:g} s: {why}"

    def _run_success(self, event: dg.DagsterEvent) -> Iterator[str]:
        yield (
            f"{event.job_name}: done in {self._seconds()}: {len(self._made)} assets, "
            f"{self._passed_checks} checks passed"
        )
        if self._result:
            yield self._result

    def _run_failure(self, event: dg.DagsterEvent) -> Iterator[str]:
        error = event.job_failure_data.error
        # The errors of failed steps are printed already. This one is of the run itself.
        if not self._failed and error is not None:
            yield error.to_string()
        yield f"{event.job_name}: failed after {self._seconds()}: {', '.join(self._failed)}"

    def _run_canceled(self, event: dg.DagsterEvent) -> Iterator[str]:
        yield ": ".join(
            [f"{event.job_name}: cancelled after {self._seconds()}", *filter(None, self._failed)]
        )

    def _seconds(self) -> str:
        return f"{time.monotonic() - self._began:.0f} s"


def _root(error: Any) -> Any:
    """The first error of a chain of causes: the one that was not caused by another."""
    while error.cause is not None:
        error = error.cause
    return error


def _short(value: dg.MetadataValue[Any]) -> str | None:
    """A metadata value as a few words; None if it needs more room."""
    if isinstance(value, dg.FloatMetadataValue):
        return f"{value.value:.4g}"
    if isinstance(value, (dg.IntMetadataValue, dg.BoolMetadataValue)):
        return str(value.value)
    if isinstance(value, dg.TextMetadataValue):
        text = value.text or ""
        return text if len(text) <= _LONGEST_TEXT and "\n" not in text else None
    return None


@dg.logger(
    config_schema={
        "log_level": dg.Field(
            str, default_value="INFO", description="The least level of log lines."
        )
    },
    description="A short line for each asset, check that failed, log line, and the end of the run.",
)
def console_logger(context: dg.InitLoggerContext) -> logging.Logger:
    """The logger of all jobs of recipes."""
    least = logging.getLevelNamesMapping()[context.logger_config["log_level"].upper()]
    assert context.job_def is not None, "the loggers of a run know its job"
    layer = context.job_def.asset_layer
    names = {
        layer.get(key).assets_def.op.name: key.to_user_string()
        for key in layer.executable_asset_keys
    }
    # Dagster makes a run's logger twice: for the run and for its steps. Both get the same logger,
    # so that the last lines of the run can count what the steps did.
    logger = logging.getLogger(f"diffsynth_dagster.console.{context.run_id}")
    if not logger.handlers:
        logger.setLevel(logging.DEBUG)
        logger.propagate = False
        logger.addHandler(ConsoleHandler(names, least))
    return logger
