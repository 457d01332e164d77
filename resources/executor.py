"""The executor of all runs: Dagster's in-process executor, and a lock that shows if a run lives.

Dagster frees a run's slot in a pool when the run ends. A run that is killed never ends, so its slot
would stay occupied for ever. Each run therefore holds a file lock while it lives (`run_locks`). The
daemon finds dead runs by their free locks (`run_launcher`). Without a daemon, each new run looks
for them first.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import dagster as dg
from dagster_shared.error import SerializableErrorInfo

from diffsynth_dagster.project import project_root, ui_command
from resources.failing import Cancelled
from resources.run_launcher import DIED
from resources.run_locks import held, lock_state, locks_folder

if TYPE_CHECKING:
    from dagster._core.executor.init import InitExecutorContext

_TEMPORARY = ".tmp_dagster_home_"
"""Prefix of the temporary folder that Dagster's commands make if DAGSTER_HOME is not set."""


class WatchedExecutor(dg.Executor):
    """Executes a run with another executor while holding the run's lock."""

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
        with held(instance, plan_context.dagster_run):
            # Before any step waits for a slot that a dead run may occupy.
            clear_dead_runs(instance)
            try:
                for event in self._inner.execute(plan_context, execution_plan):
                    if event.event_type == dg.DagsterEventType.LOGS_CAPTURED:
                        plan_context.log.info(_where_logged(instance, plan_context.run_id, event))
                    yield _without_traceback(event)
            except (KeyboardInterrupt, dg.DagsterExecutionInterruptedError):
                _report_canceling(instance, plan_context.run_id)
                raise Cancelled from None  # without a reason: the step has just reported it


def _without_traceback(event: dg.DagsterEvent) -> dg.DagsterEvent:
    """The event of a failed step without the traceback; other events as they are.

    At this point the event is logged already, with its traceback. Dagster repeats the error of the
    step at the end of the run, where the reason is wanted but not a second traceback.
    """
    if not event.is_step_failure or event.step_failure_data.user_failure_data is None:
        return event
    data: Any = event.step_failure_data
    reason = SerializableErrorInfo(data.error.message, [], data.error.cls_name)
    return event._replace(event_specific_data=data._replace(error=reason))


def _report_canceling(instance: dg.DagsterInstance, run_id: str) -> None:
    """Make a run that a signal interrupted end as cancelled, like one that is cancelled in the UI.
    Dagster would mark it as failed."""
    run = instance.get_run_by_id(run_id)
    # A cancel in the UI has set the status to "canceling" already.
    if run is not None and run.status == dg.DagsterRunStatus.STARTED:
        instance.report_run_canceling(run, "The process of the run was interrupted by a signal.")


def _where_logged(instance: dg.DagsterInstance, run_id: str, event: dg.DagsterEvent) -> str:
    """A log line that says where the run's whole log and the output of its processes are."""
    if is_temporary(instance):
        return (
            f"run {run_id}: DAGSTER_HOME is not set, so its log is gone when this command ends. "
            f"To find it in the UI ({ui_command()}): export DAGSTER_HOME={project_root() / 'dagster_home'}"
        )
    manager = instance.compute_log_manager
    key = manager.build_log_key_for_run(run_id, event.logs_captured_data.file_key)
    printed = manager.get_log_metadata(key).stderr_location
    return (
        f"run {run_id}: the whole log is in the UI ({ui_command()}), "
        f"the output of the processes in {printed}"
    )


def is_temporary(instance: dg.DagsterInstance) -> bool:
    """Whether the instance is deleted when the command ends, because DAGSTER_HOME is not set."""
    folder = Path(instance.root_directory).name
    return instance.is_ephemeral or folder.startswith(_TEMPORARY)


def clear_dead_runs(instance: dg.DagsterInstance) -> None:
    """Mark runs whose lock nobody holds as failed, and free their slots in pools."""
    for path in sorted(locks_folder(instance).iterdir()):
        # A name with a dot is a lock that is just being made: see `run_locks.held`.
        if path.name.startswith(".") or lock_state(path) != "free":
            continue
        run = instance.get_run_by_id(path.name)
        if run is not None and not run.is_finished:
            instance.report_run_failed(run, DIED)
        if instance.event_log_storage.supports_global_concurrency_limits:
            instance.event_log_storage.free_concurrency_slots_for_run(path.name)
        path.unlink(missing_ok=True)  # last: if this process dies before, the next run goes on


_CONFIG: Any = dg.in_process_executor.config_schema


@dg.executor(name="in_process", config_schema=_CONFIG)
def run_executor(context: "InitExecutorContext") -> dg.Executor:
    """Executes all steps of a run in one process."""
    inner: Any = dg.in_process_executor.executor_creation_fn
    return WatchedExecutor(inner(context))
