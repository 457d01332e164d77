"""How a training process fails reaches whoever launched it as data, from any process, at any time."""

import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import dagster as dg
import pytest
from conftest import ROOT, Values, train, train_to_end, write_images
from dagster_support import Told, execute, has_stepped, told, write_recipe
from process_support import forked_launches

from diffsynth_dagster.errors import DownloadError, ParameterError, Stopped
from diffsynth_dagster.run.failure import (
    FAILURE_FOLDER,
    Failure,
    read_failures,
    read_silent,
)
from diffsynth_dagster.run.guard import FailureGuard, PrintedFailures, WrittenFailures
from diffsynth_dagster.run.resume_point import newest_step
from diffsynth_dagster.train import main
from resources import Launcher

FAILING = """
import os, signal, time
import torch

def deep(depth):
    if depth:
        deeper(depth - 1)
    return 1 / depth

def deeper(depth):  # two in turn: Python shows repeated lines once
    deep(depth)

def make_table(folder):
    try:
        deep(20)
    except ZeroDivisionError as error:
        raise RuntimeError("the table cannot be made") from error

def interrupt(folder):
    os.kill(os.getpid(), signal.SIGINT)

class Killed(torch.optim.SGD):
    def step(self, closure=None):
        os.kill(os.getpid(), signal.SIGKILL)

class Crashing(torch.optim.SGD):
    steps = 0

    def step(self, closure=None):
        self.steps += 1
        if self.steps == 2:
            raise ZeroDivisionError("nothing is left")

class Cancelling(torch.optim.SGD):
    def step(self, closure=None):
        os.kill(int(os.environ["CANCELLED"]), signal.SIGINT)
        time.sleep(0.5)

class Stopping(torch.optim.SGD):
    def step(self, closure=None):
        os.kill(os.getpid(), signal.SIGINT)

class Hungry(torch.optim.SGD):
    def step(self, closure=None):
        with open("{tries}", "a") as file:
            file.write("again ")
        torch.empty(2**46)

class MistakenOnOne(torch.optim.SGD):
    def __init__(self, *arguments, **options):
        if os.environ["RANK"] == "1":
            raise ValueError("only here")
        super().__init__(*arguments, **options)
"""


SILENT = """
import os, signal, sys
from diffsynth_dagster.run.guard import FailureGuard, failure_reporter
with FailureGuard(failure_reporter()):
    os.kill(os.getpid(), getattr(signal, sys.argv[1]))
"""

NO_TABLE = {"dataset_metadata_path": "none.csv", "task": "sft"}


@dataclass
class Place:
    """Encoded samples, and recipes that train from them."""

    folder: Path
    values: dict[str, Any]

    def failure(self, kind: str = "checkpoints", **overrides: Any) -> Told:
        """Run one asset of a recipe, which fails; returns what the run's page says."""
        run = {"output_path": str(self.folder / "run"), "retries": 0}
        values = {**self.values, **run, **overrides}
        write_recipe(self.folder / "recipes", "failing", values)
        with dg.DagsterInstance.ephemeral() as instance:
            key = dg.AssetKey(["failing", kind])
            events = execute(self.folder / "recipes", "train_failing", instance, key)
        ends = (dg.DagsterEventType.RUN_FAILURE, dg.DagsterEventType.RUN_CANCELED)
        assert any(event.event_type in ends for event in events)
        return told(events)


def require_printed_once(told: Told, printed: str) -> None:
    """The command line says what the page does: the reason once, and a traceback only if there is one."""
    if told.trace:
        assert printed.count(told.trace) == 1, printed
        printed = printed.replace(told.trace, "")
    assert printed.count(told.reason.splitlines()[0]) == 1, printed
    assert "Traceback" not in printed
    assert "AttributeError" not in printed
    assert "Stack Trace" not in printed


@pytest.fixture(scope="module")
def encoded(shared_values: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("encoded") / "run"
    return train_to_end(shared_values, folder, "--task", "sft:data_process")


@pytest.fixture
def place(values: Values, encoded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    (tmp_path / "code").mkdir()
    code = FAILING.replace("{tries}", str(tmp_path / "tries"))
    (tmp_path / "code" / "failing.py").write_text(code, encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "code"))
    monkeypatch.syspath_prepend(str(tmp_path / "code"))
    monkeypatch.delitem(sys.modules, "failing", raising=False)  # that of another test
    given = {k: v for k, v in values().items() if k != "dataset_metadata_path"}
    return Place(tmp_path, {**given, "dataset_base_path": str(encoded), "task": "sft:train"})


@pytest.fixture
def forked() -> Iterator[None]:
    """Training processes that start fast; see `process_support`."""
    with forked_launches():
        yield


@pytest.mark.usefixtures("forked")
def test_mistake_before_anything_is_set_up(place: Place, capfd: pytest.CaptureFixture[str]) -> None:
    """No reporter of a training exists yet, and no process group."""
    said = place.failure(enable_swanlab_log=True)
    assert said.reason.splitlines() == [
        "swanlab is not installed",
        "  where: enable_swanlab_log",
        "  what to do: pip install swanlab",
    ]
    assert not said.trace
    printed = capfd.readouterr().err
    require_printed_once(said, printed)
    last = printed.splitlines()[-1]
    assert re.fullmatch(r"train_failing: failed after \d+ s: failing/checkpoints", last), printed


def test_rejected_rows(place: Place, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The check that fails says how many and which, and so does the failure of its step."""
    data = write_images(tmp_path / "data", 4)
    (data / "1.png").unlink()
    table = {"dataset_metadata_path": str(data / "metadata.csv"), "task": "sft"}
    said = place.failure("metadata", dataset_base_path=str(data), **table)
    assert said.reason.splitlines() == [
        "3 of 4 rows are usable; 1 is rejected: 1 file missing (allowed: 0 %)",
        f"  row 2: image '1.png': the file does not exist: {data / '1.png'}",
        f"  where: {data / 'metadata.csv'}",
        "  what to do: mend or remove these rows, or allow some to be left out with "
        "max_rejected_fraction",
    ]
    assert not said.trace
    require_printed_once(said, capfd.readouterr().err)


def test_error_in_the_users_function(place: Place, capfd: pytest.CaptureFixture[str]) -> None:
    """All of the user's own traceback, from where their code begins, also with what led to it."""
    said = place.failure("metadata", customized_dataset="failing.make_table", **NO_TABLE)
    file = place.folder / "code" / "failing.py"
    line = FAILING.splitlines().index("    return 1 / depth") + 1
    assert said.reason.splitlines() == [
        "RuntimeError: the table cannot be made",
        f"  where: {file}, line {line + 9}, in make_table",
    ]
    assert said.trace.count(f'File "{file}"') == said.trace.count("File ") == 43
    assert f'  File "{file}", line {line}, in deep' in said.trace
    assert said.trace.startswith("Traceback (most recent call last):")
    assert said.trace.rstrip().endswith("RuntimeError: the table cannot be made")
    require_printed_once(said, capfd.readouterr().err)


def test_cancel(place: Place, capfd: pytest.CaptureFixture[str]) -> None:
    """A run that is interrupted is cancelled, not broken. (From the UI: see `test_dagster_ui.py`.)"""
    said = place.failure("metadata", customized_dataset="failing.interrupt", **NO_TABLE)
    assert said.reason.startswith("cancelled: the run was asked to stop, in the UI or by Ctrl-C\n")
    assert not said.trace
    printed = capfd.readouterr().err
    (_,) = re.findall(r"^train_failing: cancelled after \d+ s: failing/metadata$", printed, re.M)
    assert "Traceback" not in printed
    assert "failed" not in printed


@pytest.mark.usefixtures("forked")
def test_cancelled_training_says_where_it_goes_on(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the state that it writes when it is asked to stop."""
    monkeypatch.setenv("CANCELLED", str(os.getpid()))
    said = place.failure(customized_optimizer="failing.Cancelling", num_epochs=100)
    (state,) = (place.folder / "run" / "state").glob("step-*")
    assert said.reason.splitlines() == [
        "cancelled: the run was asked to stop, in the UI or by Ctrl-C",
        "  what to do: nothing is broken: run it again, and the training goes on after step "
        + state.name.removeprefix("step-"),
    ]
    assert not said.trace


@pytest.mark.usefixtures("forked")
def test_a_run_that_takes_too_long_is_ended(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """With its training, which goes on after the state that it then writes. It has failed, not been cancelled."""
    run = place.folder / "run"

    def now() -> float:
        return time.time() + (1001 if has_stepped(run) else 0)

    monkeypatch.setattr("resources.deadline.time", SimpleNamespace(time=now))
    said = place.failure(tags={"dagster/max_runtime": 1000}, num_epochs=1_000_000)
    newest = newest_step(run)
    steps = (run / "metrics.csv").read_text()
    assert said.reason.splitlines() == [
        "the run took longer than the 1000 s of its tag 'dagster/max_runtime'",
        "  what to do: allow more in the recipe's 'tags', or run it again: the training goes on after step "
        + str(newest),
    ]
    assert not said.trace
    time.sleep(0.5)
    assert (run / "metrics.csv").read_text() == steps, "it still trains"


@pytest.mark.usefixtures("forked")
def test_crash_in_training(place: Place, capfd: pytest.CaptureFixture[str]) -> None:
    said = place.failure(customized_optimizer="failing.Crashing", state_steps=1)
    file = place.folder / "code" / "failing.py"
    line = FAILING.splitlines().index('            raise ZeroDivisionError("nothing is left")') + 1
    assert said.reason.splitlines() == [
        "ZeroDivisionError: nothing is left",
        f"  where: {file}, line {line}, in step",
        "  what to do: when the cause is gone, run it again: the training goes on after step 1",
    ]
    assert said.trace.splitlines()[1] == f'  File "{file}", line {line}, in step'
    assert said.trace.rstrip().endswith("ZeroDivisionError: nothing is left")
    require_printed_once(said, capfd.readouterr().err)


@pytest.mark.usefixtures("forked")
def test_too_little_memory_is_said_and_not_tried_again(place: Place) -> None:
    what, where, do = place.failure(
        customized_optimizer="failing.Hungry", retries=2
    ).reason.splitlines()
    assert what.startswith("the memory of the CPU is not enough in the training: 256.0 TiB more")
    assert where.startswith("  where: it was taken by: weights ")
    assert do.startswith("  what to do: try, in this order: use_gradient_checkpointing: true; ")
    assert (place.folder / "tries").read_text() == "again "


@pytest.mark.soak
def test_killed_trainer(place: Place, capfd: pytest.CaptureFixture[str]) -> None:
    said = place.failure(customized_optimizer="failing.Killed")
    what, where, do = said.reason.splitlines()
    assert what == "sft:train was killed by a signal from outside"
    assert where == f"  where: process 0, in {place.folder / 'run'}"
    assert "for want of memory" in do
    assert do.endswith(
        "Then run it again: the training has no state yet, and begins with its first step"
    )
    assert not said.trace
    require_printed_once(said, capfd.readouterr().err)


@pytest.mark.parametrize("signal", ["SIGSEGV", "SIGKILL"])
def test_process_that_ends_without_a_word(folder: Path, signal: str) -> None:
    """Compiled code that crashes shows where Python was; of what was killed, nothing is known."""
    done = subprocess.run([sys.executable, "-c", SILENT, signal], cwd=ROOT)
    assert done.returncode < 0
    assert not read_failures(folder)
    ((process, trace),) = read_silent(folder).items()
    assert process == 0
    if signal == "SIGKILL":
        assert not trace
    else:
        assert trace.startswith("Fatal Python error: Segmentation fault")
        assert 'File "<string>", line' in trace


@pytest.mark.usefixtures("forked")
def test_stop_from_outside_is_no_crash(place: Place) -> None:
    said = place.failure(customized_optimizer="failing.Stopping")
    assert said.reason.splitlines() == [
        "sft:train was stopped by a signal",
        "  what to do: run it again: the training goes on after step 1",
    ]
    assert not said.trace


def test_stop_of_a_command_says_where_it_goes_on(
    place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    given = {**place.values, "customized_optimizer": "failing.Stopping"}
    assert train(given, place.folder / "run")[0] == 130
    said = "stopped; with the same command the training goes on after step 1"
    assert capsys.readouterr().err.splitlines()[-1] == said


@pytest.mark.soak
def test_mistake_on_the_second_of_two_processes(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    monkeypatch.setattr(Launcher, "_launch", lambda *_: command)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    said = place.failure(customized_optimizer="failing.MistakenOnOne", batch_size=1)
    assert said.reason.splitlines()[:2] == [
        "the optimizer cannot be made: only here",
        "  where: customized_optimizer = failing.MistakenOnOne",
    ]
    assert not said.trace


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(FAILURE_FOLDER, str(tmp_path / "failures"))
    return tmp_path / "failures"


def test_bad_flag_is_data_not_print(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--lora_rnk", "4"]) == 2
    (failure,) = read_failures(folder)
    assert (failure.kind, failure.where) == ("mistake", "the command line")
    assert failure.what == "unknown parameter --lora_rnk; did you mean 'lora_rank'?"
    assert not failure.may_retry
    assert capsys.readouterr().err == ""


def test_failing_import_is_data(
    folder: Path, values: Values, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "diffsynth_dagster.pipeline", None)
    code, _ = train(values(), tmp_path / "run")
    assert code == 1
    (failure,) = read_failures(folder)
    assert failure.kind == "crash"
    assert "diffsynth_dagster.pipeline" in failure.what
    assert "Traceback" in (failure.traceback or "")


def test_the_cause_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stopped process and one that lost its peer say less than the mistake behind both."""
    errors = [Stopped(), RuntimeError("the peer is gone"), ParameterError("wrong", do="mend it")]
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    for process, error in enumerate(errors):
        monkeypatch.setenv("RANK", str(process))
        guard = FailureGuard(WrittenFailures(tmp_path))
        with guard:
            raise error
        assert guard.code == (130, 1, 2)[process]
    assert [(f.kind, f.process, f.processes) for f in read_failures(tmp_path)] == [
        ("mistake", 2, 3),
        ("crash", 1, 3),
        ("stopped", 0, 3),
    ]
    assert str(read_failures(tmp_path)[0]) == str(errors[2])


def test_download_may_be_tried_again(folder: Path) -> None:
    with FailureGuard(WrittenFailures(folder)):
        raise DownloadError("the hub did not answer")
    (failure,) = read_failures(folder)
    assert failure.may_retry


def test_a_failure_that_no_launcher_reads_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    with FailureGuard(PrintedFailures()) as guard:
        raise ParameterError("wrong", where="here", do="mend it")
    assert guard.code == 2
    assert capsys.readouterr().err == "error: wrong\n  where: here\n  what to do: mend it\n"
    # The folder of the launcher cannot be written:
    WrittenFailures(Path("/dev/null/none")).report(Failure("mistake", "wrong"))
    assert capsys.readouterr().err == "error: wrong\n"
