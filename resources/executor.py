"""The executor of all runs: Dagster's in-process one, and an eye on runs that died.

A run that is killed keeps its place in a pool for ever: Dagster frees places of runs that end, and
this one never did. So each run holds a lock on a file of its own, which the system takes back
however the run dies, and a new run first clears away those that hold theirs no more.
"""

import fcntl
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import dagster as dg

if TYPE_CHECKING:
    from dagster._core.executor.init import InitExecutorContext

_FOLDER = "run_locks"
_DIED = "The process of this run is gone: it was killed, or its machine was."


class WatchedExecutor(dg.Executor):
    """Runs what another executor runs, under the run's lock."""

    def __init__(self, inner: dg.Executor) -> None:
        self._inner = inner

    @property
    def retries(self) -> Any:
        return self._inner.retries

    @property
    def step_dependency_config(self) -> Any:
        return self._inner.step_dependency_config

    def execute(self, plan_context: Any, execution_plan: Any) -> Iterator[dg.DagsterEvent]:
        instance: dg.DagsterInstance = plan_context.instance
        locks = Path(instance.storage_directory()) / _FOLDER
        with _held(locks, plan_context.run_id):
            clear_dead_runs(instance, locks)
            for event in self._inner.execute(plan_context, execution_plan):
                if event.event_type == dg.DagsterEventType.LOGS_CAPTURED:
                    plan_context.log.info(_where_logged(instance, plan_context.run_id, event))
                yield event


def _where_logged(instance: dg.DagsterInstance, run_id: str, event: dg.DagsterEvent) -> str:
    """Where the whole log of a run is, and what its processes print."""
    manager = instance.compute_log_manager
    key = manager.build_log_key_for_run(run_id, event.logs_captured_data.file_key)
    printed = manager.get_log_metadata(key).stderr_location
    return (
        f"run {run_id}: the whole log is in the UI (dagster dev), "
        f"the output of the processes in {printed}"
    )


@contextmanager
def _held(folder: Path, run_id: str) -> Generator[None]:
    folder.mkdir(parents=True, exist_ok=True)
    path, staged = folder / run_id, folder / f".{run_id}"
    with staged.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        staged.replace(path)  # locked before anyone can find it
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def clear_dead_runs(instance: dg.DagsterInstance, locks: Path) -> None:
    """Free the places in pools of runs whose lock nobody holds, and mark them as failed."""
    for path in sorted(locks.iterdir()):
        if path.name.startswith(".") or not _is_free(path):
            continue
        run = instance.get_run_by_id(path.name)
        if run is not None and not run.is_finished:
            instance.report_run_failed(run, _DIED)
        if instance.event_log_storage.supports_global_concurrency_limits:
            instance.event_log_storage.free_concurrency_slots_for_run(path.name)
        path.unlink(missing_ok=True)


def _is_free(path: Path) -> bool:
    try:
        with path.open() as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except FileNotFoundError:  # its run has just ended
        return False
    return True


_CONFIG: Any = dg.in_process_executor.config_schema


@dg.executor(name="in_process", config_schema=_CONFIG)
def run_executor(context: "InitExecutorContext") -> dg.Executor:
    """One process for all steps of a run."""
    inner: Any = dg.in_process_executor.executor_creation_fn
    return WatchedExecutor(inner(context))
