"""Take the pictures of `failures.md`: four runs that fail, as the run's page in the UI shows them.

python docs/make_failures.py [NAME …]

It starts the real webserver with the project's settings, launches each run through it, and looks at
the page with Chromium (`apt-get install chromium chromium-driver`).
"""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import yaml
from browser import INSTALL, Browser, browsing, free_port, listens, look, stop, wait_for
from dagster import DagsterRunStatus
from dagster_graphql import DagsterGraphQLClient
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
PICTURES = ROOT / "docs" / "failures"
LOCATION = {"repository_location_name": "diffsynth_dagster", "repository_name": "__repository__"}
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
        # So that no other training on this machine is waited for.
        "DIFFSYNTH_DAGSTER_PLACES": str(folder / "places"),
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
        browser = leaving.enter_context(browsing())
        for name, run in runs.items():
            look(browser, port, run, WORDS[name], STEPS.get(name))
            browser.keep(PICTURES / f"{name}.png")


if __name__ == "__main__":
    main()
