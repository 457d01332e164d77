"""Dagster's webserver and daemon on loopback (`dagster dev`), used as people use them."""

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from browser import free_port, listens, stop
from conftest import ROOT
from dagster import DagsterRunStatus
from dagster_graphql import DagsterGraphQLClient
from dagster_support import start, wait_for

LOCATION = {
    "repository_location_name": "diffsynth_dagster",
    "repository_name": "__repository__",
}


@dataclass
class Server:
    """A running `dagster dev` and the folders it works in."""

    folder: Path
    env: dict[str, str]
    process: subprocess.Popen[bytes]
    client: DagsterGraphQLClient
    port: int

    def launch(self, name: str, parameters: dict[str, Any]) -> str:
        return self.client.submit_job_execution(f"train_{name}", run_config=parameters, **LOCATION)

    def wait(self, run: str, seconds: float) -> DagsterRunStatus:
        ended = {
            DagsterRunStatus.SUCCESS,
            DagsterRunStatus.FAILURE,
            DagsterRunStatus.CANCELED,
        }

        def status() -> DagsterRunStatus | None:
            now = self.client.get_run_status(run)
            return now if now in ended else None

        return wait_for(status, seconds, f"the end of run {run}")


@contextmanager
def serve(folder: Path, env: dict[str, str]) -> Iterator[Server]:
    """Run `dagster dev` on a free port while the block runs."""
    port = free_port()
    address = ["-h", "127.0.0.1", "-p", str(port), "-w", str(ROOT / "workspace.yaml")]
    log = folder / "log"
    process = start(["-m", "dagster", "dev", *address], env, log)

    def is_up() -> bool:
        assert process.poll() is None, log.read_text()
        return listens(port)

    try:
        wait_for(is_up, 90, "dagster dev listens")
        client = DagsterGraphQLClient("127.0.0.1", port_number=port)
        yield Server(folder, env, process, client, port)
    finally:
        stop(process.pid)
