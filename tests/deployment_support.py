"""Dagster as it is deployed: webserver, daemon and code server as processes that may be killed."""

import signal
import subprocess
import time
from collections.abc import Generator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import yaml
from browser import free_port, listens
from dagster_graphql import DagsterGraphQLClient, ReloadRepositoryLocationStatus
from dagster_support import environment, home, start, wait_for

SHORT_TIMES = {
    "run_queue": {"user_code_failure_retry_delay": 3, "dequeue_interval_seconds": 1},
    "run_monitoring": {"poll_interval_seconds": 2, "start_timeout_seconds": 60},
}
"""Settings in which the dagster.yaml of a soak differs from ours."""
LOCATION = "diffsynth_dagster"
TESTS = Path(__file__).parent
STARTS_WITHIN = 180.0
ENDS_WITHIN = 60.0


def alive(processes: list[psutil.Process]) -> list[psutil.Process]:
    """The processes that still run."""
    found: list[psutil.Process] = []
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            if process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


@dataclass
class Deployment:
    """The processes of a Dagster deployment with a DAGSTER_HOME of its own and `SHORT_TIMES`.

    Attributes:
        folder: holds everything: `home`, `recipes`, `tmp` (TMPDIR), `places` and logs.
        env: environment variables of all processes.
        ports: name of a server → its port.
        processes: name → process.
        night: file with the time of a further cron tick: see `soak_daemon`.
        real: while this file exists, trainings are launched by the real launcher: see `soak_forks`.
    """

    folder: Path
    env: dict[str, str]
    ports: Mapping[str, int]
    processes: dict[str, subprocess.Popen[bytes]] = field(
        default_factory=dict[str, subprocess.Popen[bytes]]
    )

    @property
    def night(self) -> Path:
        return Path(self.env["SOAK_NIGHT"])

    @property
    def real(self) -> Path:
        return Path(self.env["SOAK_REAL"])

    @property
    def home(self) -> Path:
        return Path(self.env["DAGSTER_HOME"])

    def start(self, name: str) -> None:
        """Start one of the processes if it does not run. This does not wait until it answers."""
        if name in self.processes and self.processes[name].poll() is None:
            return
        port, workspace = str(self.ports.get(name, 0)), str(self.folder / "workspace.yaml")
        address = ["-h", "127.0.0.1", "-p", port]
        server = ["-m", "dagster", "code-server", "start"]
        arguments = {
            "forks": [str(TESTS / "soak_forks.py"), "serve", self.env["SOAK_FORKS"]],
            "code server": [*server, *address, "-m", "soak_location", "--location-name", LOCATION],
            "daemon": [str(TESTS / "soak_daemon.py"), "run", "-w", workspace],
            "webserver": ["-m", "dagster_webserver", *address, "-w", workspace],
        }
        log = self.folder / f"{name}.{time.time():.0f}.log"
        self.processes[name] = start(arguments[name], self.env, log)

    def wait(self) -> None:
        """Wait until all servers answer."""
        for name, port in self.ports.items():
            wait_for(lambda port=port: listens(port), STARTS_WITHIN, f"the {name} listens")

    def reload(self) -> None:
        """Reload the definitions, as a person does in the UI after editing a recipe."""

        def done() -> bool:
            client = DagsterGraphQLClient("127.0.0.1", port_number=self.ports["webserver"])
            status = client.reload_repository_location(LOCATION).status
            return status == ReloadRepositoryLocationStatus.SUCCESS

        wait_for(done, STARTS_WITHIN, "definitions are loaded again")

    def stop(self, name: str, by: signal.Signals = signal.SIGTERM) -> None:
        """End one of the processes.

        Raises:
            TimeoutExpired: it has not ended within a minute and was killed.
        """
        process = self.processes.pop(name)
        process.send_signal(by)
        try:
            process.wait(ENDS_WITHIN)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            raise

    def child_of_code_server(self) -> psutil.Process | None:
        """The server with the definitions: a child process of `dagster code-server start`."""
        with suppress(psutil.NoSuchProcess):
            for child in psutil.Process(self.processes["code server"].pid).children():
                if "grpc" in child.cmdline():
                    return child
        return None

    def belonging(self) -> list[psutil.Process]:
        """All running processes with this DAGSTER_HOME in their environment."""
        # By the environment: a run whose parent was killed is nobody's child any more.
        found: list[psutil.Process] = []
        for process in psutil.process_iter():
            with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                if process.environ().get("DAGSTER_HOME") == str(self.home):
                    found.append(process)
        return alive(found)


@contextmanager
def deployed(folder: Path, **variables: str) -> Generator[Deployment]:
    """Run a deployment with the recipes in `folder / "recipes"` while the block runs.

    Args:
        variables: further environment variables.
    """
    dagster_home = home(folder / "home")
    settings: dict[str, Any] = yaml.safe_load((dagster_home / "dagster.yaml").read_text())
    for name, values in SHORT_TIMES.items():
        settings[name] |= values
    (dagster_home / "dagster.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    ports = {name: free_port() for name in ("code server", "webserver")}
    where = {"host": "127.0.0.1", "port": ports["code server"], "location_name": LOCATION}
    workspace = yaml.safe_dump({"load_from": [{"grpc_server": where}]})
    (folder / "workspace.yaml").write_text(workspace, encoding="utf-8")
    for name in ("tmp", "places"):
        (folder / name).mkdir()
    own = {
        "TMPDIR": str(folder / "tmp"),
        "DIFFSYNTH_DAGSTER_PLACES": str(folder / "places"),
        "SOAK_FORKS": f"soak-{folder}",
        "SOAK_NIGHT": str(folder / "night"),
        "SOAK_REAL": str(folder / "real"),
        "CUDA_VISIBLE_DEVICES": "",
        **variables,
    }
    env = environment(dagster_home, folder / "recipes") | own
    # For `soak_location`, which the code server imports.
    env["PYTHONPATH"] = ":".join([str(TESTS), *filter(None, [env.get("PYTHONPATH")])])
    made = Deployment(folder, env, ports)
    made.night.write_text("0")  # in 1970: no night
    try:
        # In this order: the daemon and the webserver ask the code server for the definitions.
        for name in ("forks", "code server"):
            made.start(name)
        wait_for(lambda: listens(ports["code server"]), STARTS_WITHIN, "the code server listens")
        for name in ("daemon", "webserver"):
            made.start(name)
        made.wait()
        yield made
    finally:
        for process in made.belonging():
            with suppress(psutil.NoSuchProcess):
                process.kill()
