"""Take the pictures of `failures.md`: four runs that fail, as the run's page in the UI shows them.

python docs/make_failures.py [NAME …]

It starts the real webserver with the project's settings, launches each run through it, and looks at
the page with Chromium (`apt-get install chromium chromium-driver`).
"""

import base64
import io
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import psutil
import requests
import yaml
from dagster import DagsterRunStatus
from dagster_graphql import DagsterGraphQLClient
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
PICTURES = ROOT / "docs" / "failures"
INSTALL = "apt-get install chromium chromium-driver"
LOCATION = {"repository_location_name": "diffsynth_dagster", "repository_name": "__repository__"}
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
WINDOW = (1280, 1000)
MY_CODE = '''\
import os
import signal
import time

import torch


def share(count, of):
    return count / len(of)


def make_table(folder):
    """Fails as anyone's code may."""
    share(10, of=[])


class Killed(torch.optim.SGD):
    """What the system does when there is no memory left."""

    def step(self, closure=None):
        os.kill(os.getpid(), signal.SIGKILL)


class Endless(torch.optim.SGD):
    def step(self, closure=None):
        time.sleep(0.2)
'''
CHANGES: dict[str, dict[str, Any]] = {
    "data_error": {"dataset_metadata_path": "bad.csv"},
    "user_exception": {"customized_dataset": "my_code.make_table"},
    "killed_trainer": {"customized_optimizer": "my_code.Killed"},
    "cancel": {"customized_optimizer": "my_code.Endless", "num_epochs": 300},
}
WORDS = {
    "data_error": "rows are usable",
    "user_exception": "ZeroDivisionError: division by zero",
    "killed_trainer": "was killed by a signal",
    "cancel": "cancelled: the run was asked to stop",
}
"""What the page says, by which it is known to be complete."""
STEPS = {"user_exception": "user_exception__metadata"}
"""The step that is chosen on a page: the traceback is in its events."""
_COLOURS = 64


class Browser:
    """Chromium without a window, through chromedriver.

    Args:
        folder: an empty one for its profile.
    """

    def __init__(self, folder: Path) -> None:
        port = free_port()
        self._driver = subprocess.Popen(
            [str(shutil.which("chromedriver")), f"--port={port}"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            # What it writes beside its profile goes there too.
            env={**os.environ, "HOME": str(folder), "TMPDIR": str(folder)},
        )
        address = f"http://127.0.0.1:{port}/session"
        wait_for(lambda: listens(port), 20, "chromedriver listens")
        size = f"--window-size={WINDOW[0]},{WINDOW[1]}"
        options = {
            "binary": shutil.which("chromium"),
            "args": [*FLAGS, size, f"--user-data-dir={folder / 'profile'}"],
        }
        wanted = {"capabilities": {"alwaysMatch": {"goog:chromeOptions": options}}}
        self._session = address
        self._session = f"{address}/{self._ask('', wanted)['sessionId']}"

    @staticmethod
    def is_installed() -> bool:
        return all(map(shutil.which, ("chromium", "chromedriver")))

    def open(self, address: str) -> None:
        self._ask("/url", {"url": address})

    def run(self, script: str) -> Any:
        """What a script returns on the open page."""
        return self._ask("/execute/sync", {"script": script, "args": []})

    def picture(self) -> bytes:
        """The page as it is seen, as PNG."""
        answer = requests.get(f"{self._session}/screenshot", timeout=60)
        return base64.b64decode(answer.json()["value"])

    def close(self) -> None:
        requests.delete(self._session, timeout=20)
        stop(self._driver.pid)

    def _ask(self, path: str, what: Mapping[str, Any]) -> Any:
        answer = requests.post(f"{self._session}{path}", json=what, timeout=60)
        value = answer.json()["value"]
        assert answer.ok, value
        return value


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def wait_for(condition: Callable[[], Any], seconds: float, what: str) -> Any:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        value = condition()
        if value:
            return value
        time.sleep(0.2)
    raise TimeoutError(f"not within {seconds:.0f} s: {what}")


def stop(pid: int) -> None:
    """End a process and whatever it started."""
    first = psutil.Process(pid)
    processes = [first, *first.children(recursive=True)]
    first.send_signal(signal.SIGINT)
    _, alive = psutil.wait_procs(processes, timeout=20)
    for process in alive:
        process.kill()


def write_runs(folder: Path) -> None:
    """The recipes of the four runs, with their data and code."""
    data = folder / "data"
    data.mkdir()
    for index in range(6):
        Image.new("RGB", (64, 64), (40 * index, 80, 120)).save(data / f"{index}.png")
    rows = [f"{index}.png,a picture of number {index}" for index in range(6)]
    (data / "good.csv").write_text("\n".join(["image,prompt", *rows]), encoding="utf-8")
    rows[1], rows[3] = "one.png,a picture that is not there", "3.png,"
    (data / "bad.csv").write_text("\n".join(["image,prompt", *rows]), encoding="utf-8")
    (folder / "my_code.py").write_text(MY_CODE, encoding="utf-8")
    demo = yaml.safe_load((ROOT / "recipes" / "demo.yaml").read_text(encoding="utf-8"))
    kept = ("family", "lora_base_model", "lora_target_modules", "height", "width")
    (folder / "recipes").mkdir()
    for name, changes in CHANGES.items():
        values: dict[str, Any] = {
            **{key: demo[key] for key in kept},
            "model_paths": [str(ROOT / path) for path in demo["model_paths"]],
            "tokenizer_path": str(ROOT / demo["tokenizer_path"]),
            "dataset_base_path": str(data),
            "dataset_metadata_path": "good.csv",
            "output_path": str(folder / "models" / name),
            "cache_path": str(folder / "cache"),
            "retries": 0,
            **changes,
        }
        values["dataset_metadata_path"] = str(data / values["dataset_metadata_path"])
        path = folder / "recipes" / f"{name}.yaml"
        path.write_text(yaml.safe_dump(values), encoding="utf-8")


@contextmanager
def webserver(folder: Path) -> Iterator[int]:
    """`dagster dev` with the project's settings and the recipes of a folder; yields its port."""
    home = folder / "home"
    home.mkdir()
    shutil.copy(ROOT / "dagster_home" / "dagster.yaml", home)
    names = {
        "DAGSTER_HOME": str(home),
        "DIFFSYNTH_DAGSTER_RECIPES": str(folder / "recipes"),
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(folder)]),
    }
    port = free_port()
    address = ["-h", "127.0.0.1", "-p", str(port), "-w", str(ROOT / "workspace.yaml")]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "dagster", "dev", *address],
            cwd=ROOT,
            env={**os.environ, **names},
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        wait_for(lambda: listens(port), 120, "dagster dev listens")
        yield port
    finally:
        stop(process.pid)


def fail(client: DagsterGraphQLClient, name: str, folder: Path) -> str:
    """Launch a run and see it fail; returns its id."""
    run = client.submit_job_execution(f"train_{name}", **LOCATION)
    if name == "cancel":
        metrics = folder / "models" / name / "metrics.csv"
        wait_for(metrics.is_file, 300, "the training steps")
        client.terminate_run(run)
    ended = (DagsterRunStatus.FAILURE, DagsterRunStatus.CANCELED)
    wait_for(lambda: client.get_run_status(run) in ended, 300, f"{name} fails")
    return run


def look(browser: Browser, port: int, run: str, words: str, step: str | None = None) -> str:
    """Open a run's page; returns its text when it has some words.

    Args:
        step: chosen there, so that only its events are shown.
    """
    chosen = "" if step is None else f"?logs=step%3A{step}"
    browser.open(f"http://127.0.0.1:{port}/runs/{run}{chosen}")

    def text() -> str | None:
        found = browser.run("return document.body.innerText")
        return found if words in found else None

    return wait_for(text, 30, f"the page says '{words}'")


def main() -> None:
    if not Browser.is_installed():
        sys.exit(f"Chromium is not installed: {INSTALL}")
    PICTURES.mkdir(exist_ok=True)
    with ExitStack() as leaving:
        folder = Path(leaving.enter_context(tempfile.TemporaryDirectory()))
        write_runs(folder)
        port = leaving.enter_context(webserver(folder))
        client = DagsterGraphQLClient("127.0.0.1", port_number=port)
        runs = {name: fail(client, name, folder) for name in sys.argv[1:] or CHANGES}
        browser = Browser(folder / "browser")
        leaving.callback(browser.close)
        for name, run in runs.items():
            look(browser, port, run, WORDS[name], STEPS.get(name))
            shown = Image.open(io.BytesIO(browser.picture())).convert("RGB")
            shown.quantize(_COLOURS).save(PICTURES / f"{name}.png", optimize=True)


if __name__ == "__main__":
    main()
