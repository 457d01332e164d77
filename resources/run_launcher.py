"""The run launcher for an instance (`run_launcher` in dagster.yaml): Dagster's default one, which
also detects that a run's process is dead.

The default launcher learns of a dead process from the code server. If the code server is killed as
well, the run stays "started" and keeps its slot in the pool for ever.
"""

import os
import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import dagster as dg
from dagster._core.errors import DagsterUserCodeProcessError, DagsterUserCodeUnreachableError
from dagster._core.launcher import CheckRunHealthResult, WorkerStatus

from resources.run_locks import has_announced, lock_state, locks_folder, process_of

if TYPE_CHECKING:
    from dagster._core.launcher import LaunchRunContext

DIED = "The process of this run is gone: it was killed, or its machine was."
_GONE_SECONDS = 15.0
"""How long a run may be "started" after its lock file is gone: a run removes the file shortly
before it reports its end."""
_RELOAD_SECONDS = 60


class WatchedRunLauncher(dg.DefaultRunLauncher):
    """Launches runs through the code server, and monitors them by their locks."""

    def __init__(self, inst_data: Any = None) -> None:
        super().__init__(inst_data)
        self._gone_since: dict[str, float] = {}

    @property
    def supports_check_run_worker_health(self) -> bool:
        return True

    def check_run_worker_health(self, run: dg.DagsterRun) -> CheckRunHealthResult:
        """Whether a started run's process lives. (Called by the daemon's run monitoring.)

        A run without a lock, because its job has another executor or runs on another machine,
        counts as running. "Unknown" would not do: the monitoring treats it as failed.
        """
        path = self._lock(run.run_id)
        state = lock_state(path)
        if state != "gone":
            self._gone_since.pop(run.run_id, None)
        # The lock's folder was emptied, or the run died between removing its lock and its end.
        if state == "gone" and self._is_missing(run.run_id, path):
            state = "free"
        if state == "free":
            return CheckRunHealthResult(WorkerStatus.FAILED, DIED)
        return CheckRunHealthResult(WorkerStatus.RUNNING)

    def launch_run(self, context: "LaunchRunContext") -> None:
        """Launch a run. If the code server is dead, have a new one started for the next attempt."""
        try:
            super().launch_run(context)
        except DagsterUserCodeUnreachableError:
            _start_code_server(context)
            raise  # the queue tries again, up to `max_user_code_failure_retries` times

    def terminate(self, run_id: str) -> bool:
        """Ask a run to stop; returns whether it was asked.

        If the code server that launched the run is gone, this interrupts the run's process itself,
        in the same way as the code server would.
        """
        try:
            if super().terminate(run_id):
                return True
        except (DagsterUserCodeProcessError, DagsterUserCodeUnreachableError):
            if process_of(self._lock(run_id)) is None:
                raise
        # A new code server answers that it does not know the run: interrupt it by its lock.
        process = process_of(self._lock(run_id))
        if process is None:
            return False
        os.kill(process, signal.SIGINT)
        return True

    def _lock(self, run_id: str) -> Path:
        return locks_folder(self._instance) / run_id

    def _is_missing(self, run_id: str, path: Path) -> bool:
        """Whether a started run has been without its lock for too long."""
        since = self._gone_since.setdefault(run_id, time.monotonic())
        if time.monotonic() - since < _GONE_SECONDS:
            return False
        # Only now, since this reads the run's log: a run that never had a lock is not missing one.
        return has_announced(self._instance, run_id, path)


def _start_code_server(context: "LaunchRunContext") -> None:
    """Ask the proxy before the code server, which `dagster dev` has, to start a new one."""
    from dagster._core.remote_representation.code_location import GrpcServerCodeLocation

    origin = context.dagster_run.remote_job_origin
    if context.workspace is None or origin is None:
        return
    location = context.workspace.get_code_location(origin.location_name)
    if isinstance(location, GrpcServerCodeLocation):
        try:
            location.client.reload_code(timeout=_RELOAD_SECONDS)
        except DagsterUserCodeUnreachableError:
            return  # there is no proxy: whoever started the code server has to start it again
