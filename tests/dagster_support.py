"""What the tests of the Dagster side share: recipes, jobs, instances, processes to wait for."""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dagster as dg
import psutil
import pytest
import yaml
from conftest import ROOT
from process_support import forked_launches

from diffsynth_dagster.definitions import make_code_location

STOPPED_WITHIN = 30.0


def write_recipe(folder: Path, name: str, values: Mapping[str, Any]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(dict(values)), encoding="utf-8")
    return path


def definitions_of(folder: Path) -> dg.Definitions:
    """The definitions of the code location for a folder of recipes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DIFFSYNTH_DAGSTER_RECIPES", str(folder))
        return make_code_location()


def make_job(folder: str, name: str) -> dg.JobDefinition:
    """A job of a folder of recipes."""
    # Named as a text in `execute`: Dagster calls it again wherever it needs the job.
    return definitions_of(Path(folder)).resolve_job_def(name)


def execute(
    folder: Path, name: str, instance: dg.DagsterInstance, *assets: dg.AssetKey
) -> list[dg.DagsterEvent]:
    """Run a job in this process with its own executor, as `dagster job execute` does.

    Returns:
        The events that the instance has stored.
    """
    named: Any = (str(folder), name)
    job = dg.build_reconstructable_job("dagster_support", "make_job", named)
    with dg.execute_job(
        job, instance, raise_on_error=False, asset_selection=list(assets) or None
    ) as result:
        logs = instance.all_logs(result.run_id)
    return [entry.dagster_event for entry in logs if entry.dagster_event is not None]


@dataclass(frozen=True)
class Told:
    """The errors that the page of a run shows, from first to last.

    Attributes:
        reasons: messages. The event of the failed run repeats the one of its step, because the page
            opens at the end.
        traces: tracebacks.
    """

    reasons: list[str]
    traces: list[str]

    @property
    def reason(self) -> str:
        """The one reason."""
        (reason,) = set(self.reasons)
        return reason

    @property
    def trace(self) -> str:
        """The one traceback; empty if there is none."""
        return "".join(self.traces)


def told(events: Iterable[dg.DagsterEvent]) -> Told:
    """Collect the errors of a run's events, with their causes."""
    reasons, traces = list[str](), list[str]()
    for event in events:
        error = getattr(event.event_specific_data, "error", None)
        while error is not None:
            reasons += filter(None, [error.message.strip()])
            traces += filter(None, ["".join(error.stack)])
            error = error.cause or error.context
    assert len(traces) <= 1, traces
    return Told(reasons, traces)


def failure_of(result: dg.ExecuteInProcessResult, node: str) -> str:
    """The message with which a step failed."""
    failure = result.failure_data_for_node(node)
    assert failure is not None
    assert failure.user_failure_data is not None, failure.error
    return failure.user_failure_data.description or ""


def home(folder: Path) -> Path:
    """Make a DAGSTER_HOME with the project's settings."""
    folder.mkdir(parents=True)
    shutil.copy(ROOT / "dagster_home" / "dagster.yaml", folder)
    return folder


def environment(dagster_home: Path, recipes: Path) -> dict[str, str]:
    names = {"DAGSTER_HOME": str(dagster_home), "DIFFSYNTH_DAGSTER_RECIPES": str(recipes)}
    return {**os.environ, **names}


def start(arguments: list[str], env: Mapping[str, str], log: Path) -> subprocess.Popen[bytes]:
    """Start a Python process that writes to a log file, in a session of its own."""
    with log.open("wb") as file:
        return subprocess.Popen(
            [sys.executable, *arguments],
            cwd=ROOT,
            env=dict(env),
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def job(name: str, *source: str) -> list[str]:
    """Arguments of `dagster job execute`."""
    source = source or ("-m", "diffsynth_dagster.definitions")
    return ["-m", "dagster", "job", "execute", *source, "-j", name]


@contextmanager
def executed(folder: Path, name: str, values: Mapping[str, Any]) -> Iterator[dg.DagsterInstance]:
    """Run the job of a recipe, which must succeed, with forked training processes.

    Yields:
        The instance with the run's events.
    """
    write_recipe(folder / "recipes", name, values)
    job_of_recipe = definitions_of(folder / "recipes").resolve_job_def(f"train_{name}")
    with dg.DagsterInstance.from_config(str(home(folder / "home"))) as instance:
        with forked_launches():
            assert job_of_recipe.execute_in_process(instance=instance).success
        yield instance


def wait_for(condition: Callable[[], Any], seconds: float, what: str) -> Any:
    """Wait until a condition returns something true, and return that; fail after some time."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        value = condition()
        if value:
            return value
        time.sleep(0.2)
    pytest.fail(f"not within {seconds:.0f} s: {what}")


def processes_about(marker: str) -> list[psutil.Process]:
    """Running processes that have a text in their command line."""
    found: list[psutil.Process] = []
    for process in psutil.process_iter():
        try:
            if process.status() != psutil.STATUS_ZOMBIE and marker in " ".join(process.cmdline()):
                found.append(process)
        except psutil.NoSuchProcess:
            continue
    return found


def endless(values: Mapping[str, Any], encoded: Path, run: Path) -> dict[str, Any]:
    """A recipe that trains on the data set encoded in a folder and never ends.

    It writes only its metrics.
    """
    never = 1_000_000
    given = {key: value for key, value in values.items() if key != "dataset_metadata_path"}
    return {
        **given,
        "dataset_base_path": str(encoded),
        "task": "sft:train",
        "num_epochs": never,
        "save_steps": never,
        "output_path": str(run),
    }


def has_stepped(run: Path) -> bool:
    """Whether the training in a run folder has made a step."""
    metrics = run / "metrics.csv"  # its first line holds the names of the columns
    return metrics.is_file() and metrics.read_text().count("\n") > 1


def wait_until_training(
    run: Path, starter: subprocess.Popen[bytes], log: Path, seconds: float = 120
) -> list[psutil.Process]:
    """Wait for the first step of the training in a run folder.

    Args:
        starter: the process that started the training. It must not end meanwhile.
        log: what it prints.

    Returns:
        The processes of the training.
    """

    def stepped() -> bool:
        assert starter.poll() is None, log.read_text()
        return has_stepped(run)

    wait_for(stepped, seconds, f"the first step in {run}")
    # Their command lines name the recipe that the launcher has written.
    return processes_about(str(run / ".launch.yaml"))


def require_gone(run: Path, seconds: float = STOPPED_WITHIN) -> None:
    """Fail if a process of the training in a run folder still runs after some time."""
    wait_for(lambda: not processes_about(str(run / ".launch.yaml")), seconds, "no process is left")


@dataclass
class Place:
    """A folder with recipes, data and runs, and the Dagster instance that goes with it."""

    folder: Path
    values: dict[str, Any]
    instance: dg.DagsterInstance

    def recipe(self, name: str, **overrides: Any) -> None:
        values = {**self.values, "output_path": str(self.folder / name), **overrides}
        given = {key: value for key, value in values.items() if value is not None}
        write_recipe(self.folder / "recipes", name, given)

    def run(self, name: str, **options: Any) -> dg.ExecuteInProcessResult:
        definitions = definitions_of(self.folder / "recipes")
        job = definitions.resolve_job_def(f"train_{name}")
        return job.execute_in_process(instance=self.instance, raise_on_error=False, **options)
