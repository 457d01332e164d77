"""The sensor that reports failed runs, if an environment variable says where to.

Dagster's own run failure sensor is not used: when reporting one failure raises, it goes on with the
next, so a failure during a night without network would never be reported. This sensor tries again,
with growing pauses, and gives up after three days.
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
from jobs.notifications import VARIABLE, FailedRun, NotTold, Tell, find_listener

TICK_SECONDS = 30
FIRST_WAIT, LONGEST_WAIT = 30.0, 3 * 3600.0
"""Seconds until the first retry of a report, and longest pause. Each pause is twice the last."""
GIVEN_UP_AFTER = 3 * 24 * 3600.0
"""Age in seconds of a failure from which on it is not reported any more."""
_AT_ONCE = 100
"""Failures that one tick takes up at most."""
_ENOUGH_SECONDS = 20.0
"""Time after which a tick leaves the rest to the next one: Dagster ends a tick after 60 s."""


@dataclass(frozen=True)
class Waiting:
    """A failure that is not reported yet.

    Attributes:
        failed: when the run failed. All times here are in seconds since 1970.
        tries: failed attempts so far.
        next: time of the next attempt.
    """

    run_id: str
    failed: float
    tries: int = 0
    next: float = 0.0


@dataclass(frozen=True)
class Cursor:
    """What the sensor remembers from one tick to the next.

    Attributes:
        after: id of the last failure event that was taken up.
        waiting: failures up to that event that are not reported yet, oldest first.
    """

    after: int
    waiting: Sequence[Waiting] = ()

    def text(self) -> str:
        """The cursor as JSON, which is how Dagster stores it."""
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
    """The failure sensor in a list, or an empty list if the environment names no listener.

    Args:
        steps: names of the steps of this folder of recipes. Runs with none of them are not
            reported, since another folder of recipes has its own sensor.
        jobs: names of further jobs whose runs are reported although they have no steps of a recipe.
        prefix: prefix of the sensor's name.

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
    """The sensor that reports each failed run, exactly once unless `tell` raises.

    Args:
        tell: reports one failure; raises `NotTold` if that did not work.
    """

    @dg.sensor(
        name=prefix.name("tell_failures"),
        minimum_interval_seconds=TICK_SECONDS,
        default_status=dg.DefaultSensorStatus.RUNNING,
        description=f"Tells of runs that failed, as {VARIABLE} says.",
    )
    def tell_failures(
        context: dg.SensorEvaluationContext,
    ) -> Iterator[dg.SkipReason | DagsterRunReaction]:
        # The first tick only sets the cursor: failures from before the sensor are not reported.
        if context.cursor is None:
            newest = _failures_after(context.instance, None)
            cursor = Cursor(newest[0].storage_id if newest else -1)
            yield dg.SkipReason("failures from now on are told")
        else:
            cursor = _take_up(context.instance, Cursor.read(context.cursor), steps, jobs)
            cursor, reactions = _tell_due(context.instance, cursor, tell)
            yield from reactions or [dg.SkipReason("nothing is to be told now")]
        # Last, when all reactions are yielded: a tick that dies before is repeated as a whole.
        context.update_cursor(cursor.text())

    return tell_failures


def _failures_after(instance: dg.DagsterInstance, after: int | None) -> Sequence[dg.EventLogRecord]:
    """The failures after an event id, oldest first; with None only the newest failure of all."""
    if after is None:
        return instance.fetch_run_status_changes(dg.DagsterEventType.RUN_FAILURE, limit=1).records
    later = dg.RunStatusChangeRecordsFilter(
        event_type=dg.DagsterEventType.RUN_FAILURE, after_storage_id=after
    )
    return instance.fetch_run_status_changes(later, limit=_AT_ONCE, ascending=True).records


def _take_up(
    instance: dg.DagsterInstance, cursor: Cursor, steps: Collection[str], jobs: Sequence[str]
) -> Cursor:
    """The cursor with new failures of our runs added."""
    waiting = list(cursor.waiting)
    after = cursor.after
    for record in _failures_after(instance, cursor.after):
        after, entry = record.storage_id, record.event_log_entry
        run = instance.get_run_by_id(entry.run_id)
        old = time.time() - entry.timestamp > GIVEN_UP_AFTER
        if run is None or old:  # deleted since, or the sensor was switched off for days
            continue
        if run.job_name not in jobs and ours_of(instance, run).steps.isdisjoint(steps):
            continue
        # A run may have two failure events. Only the first one counts.
        first = _failure_of(instance, entry.run_id)
        if first is not None and first.timestamp == entry.timestamp:
            waiting.append(Waiting(entry.run_id, entry.timestamp))
    return Cursor(after, waiting)


def _failure_of(instance: dg.DagsterInstance, run_id: str) -> dg.EventLogEntry | None:
    """The first failure event of a run."""
    found = instance.get_records_for_run(run_id, of_type=dg.DagsterEventType.RUN_FAILURE, limit=1)
    return found.records[0].event_log_entry if found.records else None


def _tell_due(
    instance: dg.DagsterInstance, cursor: Cursor, tell: Tell
) -> tuple[Cursor, list[DagsterRunReaction]]:
    """Report the failures that are due.

    Returns:
        the cursor with the failures that still wait, and a reaction for each attempt: Dagster notes
        on the run that it was reported, or shows the error at the tick.
    """
    began = time.time()
    left: list[Waiting] = []
    reported: list[DagsterRunReaction] = []
    errors: list[DagsterRunReaction] = []
    # Oldest first: when the time of the tick is up, the newest ones wait.
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
            errors.append(_reaction(run, _error_info(waiting, again, error)))
        else:
            reported.append(_reaction(run, None))
    # Errors last: the last reaction decides how Dagster shows the tick.
    return Cursor(cursor.after, left), reported + errors


def _again(waiting: Waiting, now: float) -> Waiting | None:
    """The failure with the time of its next attempt; None if it is given up."""
    if now - waiting.failed > GIVEN_UP_AFTER:
        return None
    # At most 20 doublings, so that the power stays a finite number.
    wait = min(FIRST_WAIT * 2.0 ** min(waiting.tries, 20), LONGEST_WAIT)
    return replace(waiting, tries=waiting.tries + 1, next=now + wait)


def _error_info(waiting: Waiting, again: Waiting | None, error: NotTold) -> SerializableErrorInfo:
    """The error that Dagster shows at the tick, with the traceback of a user's function."""
    then = "it is told no more"
    if again is not None:
        at = datetime.fromtimestamp(again.next, UTC)
        then = f"it is told again at {at:%H:%M:%S} UTC"
    message = f"the failure of run {waiting.run_id} was not told: {error}; {then}"
    cause = error.__cause__  # set if a function of the user's raised
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
    """Why a run failed: the message of the first failed step, else Dagster's own."""
    event = entry.dagster_event
    data: Any = None if event is None else event.event_specific_data
    step = data.first_step_failure_event if isinstance(data, JobFailureData) else None
    error: Any = None
    if step is not None:
        error = step.step_failure_data.error
        if step.step_failure_data.user_failure_data is None and error is not None:
            # An unexpected exception: Dagster wraps it in an error of its own, which says nothing.
            error = error.cause or error
    elif isinstance(data, JobFailureData):
        error = data.error
    if error is not None and error.message.strip():
        return str(error.message).strip()
    return entry.user_message or (event.message if event is not None else None) or "no reason given"
