"""The job that deletes old runs, so that Dagster's database and logs do not grow without end."""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import dagster as dg
from pydantic import Field

from assets.launched import ours_of
from assets.prefix import Prefix
from diffsynth_dagster.errors import ParameterError
from jobs.training import job_name
from resources import run_executor

if TYPE_CHECKING:
    from dagster._core.storage.event_log import SqlEventLogStorage

VARIABLE = "DIFFSYNTH_DAGSTER_KEEP_RUNS_DAYS"
KEEP_DAYS = 90
CRON = "40 4 * * *"
JOB = "forget_old_runs"
_FINISHED = [
    dg.DagsterRunStatus.SUCCESS,
    dg.DagsterRunStatus.FAILURE,
    dg.DagsterRunStatus.CANCELED,
]
_ROOT_RUN = "dagster/root_run_id"
"""Dagster's tag on a re-execution: the id of the run that it repeats."""


@dataclass(frozen=True)
class Upkeep:
    """The job that deletes old runs and its schedule; both empty if that is switched off."""

    jobs: list[dg.JobDefinition]
    schedules: list[dg.ScheduleDefinition]


@dataclass(frozen=True)
class Forgotten:
    """The result of `forget_runs`.

    Attributes:
        deleted: ids of the runs that were deleted.
        kept: ids of old runs that are still needed; see `forget_runs`.
    """

    deleted: list[str]
    kept: list[str]


def keep_days() -> int:
    """How many days finished runs are kept; 0 means for ever.

    Raises:
        ParameterError: the environment variable is not a whole number of at least 0.
    """
    given = os.environ.get(VARIABLE, "").strip()
    if not given:
        return KEEP_DAYS
    # With more digits, the date before which runs are deleted would lie before the year 1.
    if not (given.isascii() and given.isdecimal() and len(given) < 6):
        raise ParameterError(
            f"'{given}' is no number of days",
            where=VARIABLE,
            do=f"give a whole number, such as {KEEP_DAYS}; 0 keeps all runs",
        )
    return int(given)


def make_upkeep(prefix: Prefix = Prefix()) -> Upkeep:  # noqa: B008 - it does not change
    """The job `forget_old_runs` and its nightly schedule, which is on by default.

    Args:
        prefix: prefix of the names of all our jobs.

    Raises:
        ParameterError: see `keep_days`.
    """
    days = keep_days()
    if days == 0:
        return Upkeep([], [])
    job = _make_job(days, prefix)
    schedule = dg.ScheduleDefinition(
        name=job.name,
        job=job,
        cron_schedule=CRON,
        default_status=dg.DefaultScheduleStatus.RUNNING,
        description=f"Deletes finished runs that are older than {days} days; see {VARIABLE}.",
    )
    return Upkeep([job], [schedule])


def _make_job(days: int, prefix: Prefix) -> dg.JobDefinition:
    name = prefix.name(JOB)

    class Retention(dg.Config):
        keep_days: int = Field(
            default=days, ge=1, description="Days for which finished runs are kept."
        )

    @dg.op(name=f"{name}_op")
    def forget(context: dg.OpExecutionContext, config: Retention) -> None:
        before = datetime.now(UTC) - timedelta(days=config.keep_days)
        done = forget_runs(context.instance, before, lambda run: _is_ours(context, run, prefix))
        context.log.info(
            f"{len(done.deleted)} runs from before {before:%Y-%m-%d} are deleted; {len(done.kept)} are kept, "
            "since they hold the newest materialization, observation or check of an asset"
        )

    @dg.job(
        name=name,
        executor_def=run_executor,
        description="Deletes finished runs of recipes that are older than some days, with their logs. "
        "Runs that hold the newest state of an asset are kept; so is every file of a training.",
    )
    def forget_old_runs() -> None:
        forget()

    return forget_old_runs


def _is_ours(context: dg.OpExecutionContext, run: dg.DagsterRun, prefix: Prefix) -> bool:
    """Whether a run may be deleted: all of its steps are ours, or it is of one of our jobs."""
    if run.job_name == prefix.name(JOB):
        return True
    ours = ours_of(context.instance, run)
    return ours.all or run.job_name in {prefix.name(job_name(r)) for r in ours.recipes}


def forget_runs(
    instance: dg.DagsterInstance, before: datetime, ours: Callable[[dg.DagsterRun], bool]
) -> Forgotten:
    """Delete old runs with their events and logs.

    Two kinds of old runs are kept: a run with the newest materialization, observation, check or
    attempt of an asset, because without it the asset would count as missing and be made again; and
    a run that a run still stored re-executes.

    Args:
        before: runs that ended before this time are old.
        ours: whether a run may be deleted.
    """
    holders = set(_holders(instance))
    finished = dg.RunsFilter(statuses=_FINISHED, created_before=before)
    done = Forgotten([], [])
    # Newest first, so that re-executions are deleted before the runs that they repeat.
    for run_id in instance.get_run_ids(finished):
        record = instance.get_run_record_by_id(run_id)
        # The filter goes by the time of creation; a long run may have ended later.
        if record is None or (record.end_time or 0) > before.timestamp():
            continue
        if not ours(record.dagster_run):
            continue
        repeated = dg.RunsFilter(tags={_ROOT_RUN: run_id})
        if run_id in holders or instance.get_run_ids(repeated, limit=1):
            done.kept.append(run_id)
            continue
        _delete(instance, run_id)
        done.deleted.append(run_id)
    return done


def _holders(instance: dg.DagsterInstance) -> Iterator[str]:
    """Ids of the runs with the newest materialization, observation, check or attempt of assets."""
    keys = list(instance.all_asset_keys())
    for record in instance.get_asset_records(keys):
        entry = record.asset_entry
        yield from filter(None, [entry.last_run_id])  # the last attempt
        if entry.last_materialization is not None:
            yield entry.last_materialization.run_id
    for key in keys:
        for found in instance.fetch_observations(key, limit=1).records:
            yield found.run_id
    storage = _sql_storage(instance)
    if storage is None:
        return
    import sqlalchemy as sql
    from dagster._core.storage.event_log.schema import AssetCheckExecutionsTable

    # Dagster has no query for the newest execution of every check. The newest one may be an attempt
    # without a result; then the newest result is needed as well.
    columns = AssetCheckExecutionsTable.c
    newest = sql.select(sql.func.max(columns.id)).group_by(columns.asset_key, columns.check_name)
    evaluated = newest.where(columns.evaluation_event_storage_id.is_not(None))
    either = sql.or_(columns.id.in_(newest), columns.id.in_(evaluated))
    with storage.index_connection() as connection:
        for (run_id,) in connection.execute(sql.select(columns.run_id).where(either)).all():
            yield str(run_id)


def _sql_storage(instance: dg.DagsterInstance) -> "SqlEventLogStorage | None":
    """The event log storage, if it has Dagster's SQL tables; else None."""
    from dagster._core.storage.event_log import SqlEventLogStorage

    storage: Any = instance.event_log_storage
    return storage if isinstance(storage, SqlEventLogStorage) else None


def _delete(instance: dg.DagsterInstance, run_id: str) -> None:
    """Delete a run, and what Dagster's own deletion leaves behind: the output of its processes, its
    check results, and with SQLite the file of its events."""
    instance.compute_log_manager.delete_logs(prefix=[run_id])
    instance.event_log_storage.delete_events(run_id)
    storage = _sql_storage(instance)
    if storage is not None:
        import sqlalchemy as sql
        from dagster._core.storage.event_log.schema import AssetCheckExecutionsTable
        from dagster._core.storage.event_log.sqlite import SqliteEventLogStorage

        of_run = AssetCheckExecutionsTable.c.run_id == run_id
        with storage.index_connection() as connection:
            connection.execute(sql.delete(AssetCheckExecutionsTable).where(of_run))
        if isinstance(storage, SqliteEventLogStorage):
            for suffix in ("", "-wal", "-shm"):
                Path(f"{storage.path_for_shard(run_id)}{suffix}").unlink(missing_ok=True)
    # Last: after an interruption the run is still listed, and the next night deletes the rest.
    instance.run_storage.delete_run(run_id)
