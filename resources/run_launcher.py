"""The run launcher of an instance (`run_launcher` in its dagster.yaml): Dagster's default one, which
also finds out that a run's process is gone.

The default one hears of that from the code server. If that is killed too, the run stays started and
holds its place in the pool for ever.
"""

import os
import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import dagster as dg
from dagster._core.errors import DagsterUserCodeProcessError, DagsterUserCodeUnreachableError
from dagster._core.launcher import CheckRunHealthResult, WorkerStatus

from resources.run_locks import lock_state, locks_folder, process_of, said_to_hold

if TYPE_CHECKING:
    from dagster._core.launcher import LaunchRunContext

DIED = "The process of this run is gone: it was killed, or its machine was."
_GONE_SECONDS = 15.0
"""So long a run may be started without the lock that it had: it gives it back before it says how it
ended."""
_RELOAD_SECONDS = 60


class WatchedRunLauncher(dg.DefaultRunLauncher):
    """Launches runs through the code server, and goes by their locks afterwards."""

    def __init__(self, inst_data: Any = None) -> None:
        super().__init__(inst_data)
        self._gone_since: dict[str, float] = {}

    @property
    def supports_check_run_worker_health(self) -> bool:
        return True

    def check_run_worker_health(self, run: dg.DagsterRun) -> CheckRunHealthResult:
        """Whether a started run's process lives. (Called by the daemon's monitoring of runs.)

        A run that has no lock, because its job has another executor or another machine executes it,
        counts as running: the monitoring takes "unknown" for failed.
        """
        path = self._lock(run.run_id)
        state = lock_state(path)
        if state != "gone":
            self._gone_since.pop(run.run_id, None)
        if state == "gone" and self._is_missing(run.run_id, path):
            state = "free"
        if state == "free":
            return CheckRunHealthResult(WorkerStatus.FAILED, DIED)
        return CheckRunHealthResult(WorkerStatus.RUNNING)

    def launch_run(self, context: "LaunchRunContext") -> None:
        """Launch a run. If the code server is gone, let what stands before it start another one (in
        `dagster dev` a proxy does): the queue tries again, `max_user_code_failure_retries` times."""
        try:
            super().launch_run(context)
        except DagsterUserCodeUnreachableError:
            _start_code_server(context)
            raise

    def terminate(self, run_id: str) -> bool:
        """Ask a run to stop; returns whether it was asked. If no code server knows the run, because the
        one that launched it is gone, its process is interrupted as the code server would do it."""
        try:
            if super().terminate(run_id):
                return True
        except (DagsterUserCodeProcessError, DagsterUserCodeUnreachableError):
            if process_of(self._lock(run_id)) is None:
                raise
        process = process_of(self._lock(run_id))
        if process is None:
            return False
        os.kill(process, signal.SIGINT)
        return True

    def _lock(self, run_id: str) -> Path:
        return locks_folder(self._instance) / run_id

    def _is_missing(self, run_id: str, path: Path) -> bool:
        since = self._gone_since.setdefault(run_id, time.monotonic())
        if time.monotonic() - since < _GONE_SECONDS:
            return False
        return said_to_hold(self._instance, run_id, path)


def _start_code_server(context: "LaunchRunContext") -> None:
    from dagster._core.remote_representation.code_location import GrpcServerCodeLocation

    origin = context.dagster_run.remote_job_origin
    if context.workspace is None or origin is None:
        return
    location = context.workspace.get_code_location(origin.location_name)
    if isinstance(location, GrpcServerCodeLocation):
        try:
            location.client.reload_code(timeout=_RELOAD_SECONDS)
        except DagsterUserCodeUnreachableError:
            return  # nothing stands before it: whoever started it starts it again
