"""The sensor that tells of runs that failed, if the environment says to whom.

Not Dagster's own sensor for that: it goes on to the next failure when telling one raises, so that a
failure in a night without network is told to nobody. This one tells it again, later and later, and
gives up at last.
"""

import json
import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from typing import Any

import dagster as dg
from dagster._core.definitions.run_request import DagsterRunReaction
from dagster._core.events import JobFailureData
from dagster._utils.error import serializable_error_info_from_exc_info
from dagster_shared.error import SerializableErrorInfo

from assets.launched import Ours, ours_of
from assets.prefix import Prefix
from jobs.telling import VARIABLE, FailedRun, NotTold, Tell, find_listener

TICK_SECONDS = 30
FIRST_WAIT, LONGEST_WAIT = 30.0, 3 * 3600.0
"""Seconds until a failure is told again, each time twice as many."""
GIVEN_UP_AFTER = 3 * 24 * 3600.0
"""The age in seconds of a failure that is told no more."""
_AT_ONCE = 100
_ENOUGH_SECONDS = 20.0
"""When a tick leaves the rest to the next one."""


@dataclass(frozen=True)
class Waiting:
    """A failure that is still to be told.

    Attributes:
        failed: when the run failed; as all times here, in seconds since 1970.
        tries: how often it was tried.
        next: when it is tried again.
    """

    run_id: str
    failed: float
    tries: int = 0
    next: float = 0.0


@dataclass(frozen=True)
class Cursor:
    """What the sensor remembers from tick to tick.

    Attributes:
        after: the event up to which failures were taken up.
        waiting: those of them that are not told yet, first to last.
    """

    after: int
    waiting: Sequence[Waiting] = ()

    def text(self) -> str:
        """As Dagster keeps it."""
        return json.dumps(asdict(self))

    @classmethod
    def read(cls, text: str) -> "Cursor":
        """The inverse of `text`."""
        kept = json.loads(text)
        return cls(kept["after"], [Waiting(**waiting) for waiting in kept["waiting"]])


def make_failure_sensors(
    steps: Collection[str],
    jobs: Sequence[str] = (),
    prefix: Prefix = Prefix(),  # noqa: B008 - it does not change
) -> list[dg.SensorDefinition]:
    """The sensor, if there is someone to tell.

    Args:
        steps: names of the steps that are told of: another folder of recipes has a sensor of its own.
        jobs: names of jobs whose runs have no steps of a recipe, and are told of as well.
        prefix: in front of the sensor's name.

    Raises:
        ParameterError: see `find_listener`.
    """
    tell = find_listener()
    return [] if tell is None else [make_failure_sensor(tell, steps, jobs, prefix)]


def make_failure_sensor(
    tell: Tell,
    steps: Collection[str],
    jobs: Sequence[str] = (),
    prefix: Prefix = Prefix(),  # noqa: B008 - it does not change
) -> dg.SensorDefinition:
    """The sensor that tells of each failed run, exactly once if telling does not raise."""

    @dg.sensor(
        name=prefix.name("tell_failures"),
        minimum_interval_seconds=TICK_SECONDS,
        default_status=dg.DefaultSensorStatus.RUNNING,
        description=f"Tells of runs that failed, as {VARIABLE} says.",
    )
    def tell_failures(
        context: dg.SensorEvaluationContext,
    ) -> Iterator[dg.SkipReason | DagsterRunReaction]:
        if context.cursor is None:
            newest = _failures_after(context.instance, None)
            cursor = Cursor(newest[0].storage_id if newest else -1)
            yield dg.SkipReason("failures from now on are told")
        else:
            cursor = _take_up(context.instance, Cursor.read(context.cursor), steps, jobs)
            cursor, reactions = _tell_due(context.instance, cursor, tell)
            yield from reactions or [dg.SkipReason("nothing is to be told now")]
        context.update_cursor(cursor.text())

    return tell_failures


def _failures_after(instance: dg.DagsterInstance, after: int | None) -> Sequence[dg.EventLogRecord]:
    """Failures after an event, first to last; or the newest one."""
    if after is None:
        return instance.fetch_run_status_changes(dg.DagsterEventType.RUN_FAILURE, limit=1).records
    wanted = dg.RunStatusChangeRecordsFilter(
        event_type=dg.DagsterEventType.RUN_FAILURE, after_storage_id=after
    )
    return instance.fetch_run_status_changes(wanted, limit=_AT_ONCE, ascending=True).records


def _take_up(
    instance: dg.DagsterInstance, cursor: Cursor, steps: Collection[str], jobs: Sequence[str]
) -> Cursor:
    """The cursor with the failures that came since."""
    waiting = list(cursor.waiting)
    after = cursor.after
    for record in _failures_after(instance, cursor.after):
        after, entry = record.storage_id, record.event_log_entry
        run = instance.get_run_by_id(entry.run_id)
        old = time.time() - entry.timestamp > GIVEN_UP_AFTER
        if run is None or old:
            continue
        if run.job_name not in jobs and ours_of(instance, run).steps.isdisjoint(steps):
            continue
        first = _failure_of(instance, entry.run_id)
        if first is not None and first.timestamp == entry.timestamp:  # a run may be failed twice
            waiting.append(Waiting(entry.run_id, entry.timestamp))
    return Cursor(after, waiting)


def _failure_of(instance: dg.DagsterInstance, run_id: str) -> dg.EventLogEntry | None:
    """The event by which a run first failed."""
    found = instance.get_records_for_run(run_id, of_type=dg.DagsterEventType.RUN_FAILURE, limit=1)
    return found.records[0].event_log_entry if found.records else None


def _tell_due(
    instance: dg.DagsterInstance, cursor: Cursor, tell: Tell
) -> tuple[Cursor, list[DagsterRunReaction]]:
    """Tell what is due.

    Returns:
        what is left, and what Dagster notes of each: on the run that it was told, or the error of the
        tick. The errors are last: the last one decides how the tick ended.
    """
    began = time.time()
    left: list[Waiting] = []
    told: list[DagsterRunReaction] = []
    errors: list[DagsterRunReaction] = []
    for waiting in cursor.waiting:
        if waiting.next > began or time.time() - began > _ENOUGH_SECONDS:
            left.append(waiting)
            continue
        run, entry = instance.get_run_by_id(waiting.run_id), _failure_of(instance, waiting.run_id)
        if run is None or entry is None:  # deleted since
            continue
        try:
            tell(_failed_run(entry, run, ours_of(instance, run)))
        except NotTold as error:
            again = _again(waiting, time.time())
            left += [] if again is None else [again]
            errors.append(_reaction(run, _said(waiting, again, error)))
        else:
            told.append(_reaction(run, None))
    return Cursor(cursor.after, left), told + errors


def _again(waiting: Waiting, now: float) -> Waiting | None:
    """When a failure that was not told is told again; None where it is given up."""
    if now - waiting.failed > GIVEN_UP_AFTER:
        return None
    wait = min(FIRST_WAIT * 2.0 ** min(waiting.tries, 20), LONGEST_WAIT)
    return replace(waiting, tries=waiting.tries + 1, next=now + wait)


def _said(waiting: Waiting, again: Waiting | None, error: NotTold) -> SerializableErrorInfo:
    then = "it is told no more"
    if again is not None:
        at = datetime.fromtimestamp(again.next, UTC)
        then = f"it is told again at {at:%H:%M:%S} UTC"
    message = f"the failure of run {waiting.run_id} was not told: {error}; {then}"
    cause = error.__cause__  # of a function of the user's
    info: Any = None
    if cause is not None and cause.__traceback__ is not None:
        info = serializable_error_info_from_exc_info((type(cause), cause, cause.__traceback__))
    return SerializableErrorInfo(f"{message}\n", [], NotTold.__name__, info)


def _reaction(run: dg.DagsterRun, error: SerializableErrorInfo | None) -> DagsterRunReaction:
    return DagsterRunReaction(run, error, dg.DagsterRunStatus.FAILURE)


def _failed_run(entry: dg.EventLogEntry, run: dg.DagsterRun, ours: Ours) -> FailedRun:
    reason = _reason(entry)
    return FailedRun(
        text=f"{run.job_name} failed (run {run.run_id}):\n{reason}",
        recipe=", ".join(ours.recipes),
        run_id=run.run_id,
        job=run.job_name,
        reason=reason,
        when=datetime.fromtimestamp(entry.timestamp, UTC).isoformat(timespec="seconds"),
    )


def _reason(entry: dg.EventLogEntry) -> str:
    """What a person reads first: what the failing step says, else what Dagster does."""
    event = entry.dagster_event
    data: Any = None if event is None else event.event_specific_data
    step = data.first_step_failure_event if isinstance(data, JobFailureData) else None
    error: Any = None
    if step is not None:
        error = step.step_failure_data.error
        if step.step_failure_data.user_failure_data is None and error is not None:
            error = error.cause or error  # an error that nobody foresaw, within one of Dagster's
    elif isinstance(data, JobFailureData):
        error = data.error
    if error is not None and error.message.strip():
        return str(error.message).strip()
    return entry.user_message or (event.message if event is not None else None) or "no reason given"
