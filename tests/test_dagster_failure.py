"""How a training process fails reaches whoever launched it as data, from any process, at any time."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
from conftest import Values, train
from dagster_support import definitions_of, write_recipe

from diffsynth_dagster.errors import DownloadError, ParameterError, Stopped
from diffsynth_dagster.train import main
from diffsynth_dagster.training.failure import FAILURE_FOLDER, Failure, read_failures
from diffsynth_dagster.training.guard import FailureGuard, PrintedFailures, WrittenFailures
from resources import Launcher

FAILING = """
import os, signal
import torch

class Killed(torch.optim.SGD):
    def step(self, closure=None):
        os.kill(os.getpid(), signal.SIGKILL)

class Crashing(torch.optim.SGD):
    def step(self, closure=None):
        raise ZeroDivisionError("nothing is left")

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


@dataclass
class Place:
    """Encoded samples, and recipes that train from them."""

    folder: Path
    values: dict[str, Any]

    def failure(self, **overrides: Any) -> str:
        """Run a recipe's training as its asset does; returns how it failed."""
        run = {"output_path": str(self.folder / "run"), "retries": 0}
        values = {**self.values, **run, **overrides}
        write_recipe(self.folder / "recipes", "failing", values)
        job = definitions_of(self.folder / "recipes").resolve_job_def("train_failing")
        with dg.DagsterInstance.ephemeral() as instance:
            (key,) = (k for k in job.asset_layer.executable_asset_keys if "checkpoints" in k.path)
            result = job.execute_in_process(
                instance=instance, raise_on_error=False, asset_selection=[key]
            )
        assert not result.success
        (data,) = (e.step_failure_data for e in result.all_events if e.is_step_failure)
        assert data.user_failure_data is not None, data.error
        return data.user_failure_data.description or ""


@pytest.fixture
def place(values: Values, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    code, encoded = train(values(), tmp_path / "encoded", "--task", "sft:data_process")
    assert code == 0
    (tmp_path / "code").mkdir()
    code = FAILING.replace("{tries}", str(tmp_path / "tries"))
    (tmp_path / "code" / "failing.py").write_text(code, encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "code"))
    monkeypatch.syspath_prepend(str(tmp_path / "code"))
    given = {k: v for k, v in values().items() if k != "dataset_metadata_path"}
    return Place(tmp_path, {**given, "dataset_base_path": str(encoded), "task": "sft:train"})


def test_mistake_before_anything_is_set_up(place: Place, capfd: pytest.CaptureFixture[str]) -> None:
    """No reporter of a training exists yet, and no process group."""
    message = place.failure(enable_swanlab_log=True)
    assert message.splitlines() == [
        "swanlab is not installed",
        "  where: enable_swanlab_log",
        "  what to do: pip install swanlab",
    ]
    assert capfd.readouterr().err.count("swanlab is not installed") == 1


def test_crash_in_training_shows_its_traceback(place: Place) -> None:
    message = place.failure(customized_optimizer="failing.Crashing")
    assert message.startswith("process 0 of sft:train failed with exit code 1; its last words:")
    assert "failing.py" in message
    assert message.endswith("ZeroDivisionError: nothing is left")


def test_too_little_memory_is_said_and_not_tried_again(place: Place) -> None:
    message = place.failure(customized_optimizer="failing.Hungry", retries=2)
    what, where, do = message.splitlines()
    assert what.startswith("the memory of the CPU is not enough in the training: 256.0 TiB more")
    assert where.startswith("  where: it was taken by: weights ")
    assert do.startswith("  what to do: try, in this order: use_gradient_checkpointing: true; ")
    assert (place.folder / "tries").read_text() == "again "


def test_killed_trainer_shows_the_end_of_standard_error(place: Place) -> None:
    message = place.failure(customized_optimizer="failing.Killed")
    assert message.startswith("sft:train failed with exit code")
    assert "its last words:" in message
    assert "stopped" not in message


def test_stop_from_outside_is_no_crash(place: Place) -> None:
    message = place.failure(customized_optimizer="failing.Stopping")
    assert message == "sft:train was stopped by a signal"


def test_mistake_on_the_second_of_two_processes(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    monkeypatch.setattr(Launcher, "_launch", lambda *_: command)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    message = place.failure(customized_optimizer="failing.MistakenOnOne", batch_size=1)
    assert message.splitlines()[:2] == [
        "the optimizer cannot be made: only here",
        "  where: customized_optimizer = failing.MistakenOnOne",
    ]
    assert "Traceback" not in message


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(FAILURE_FOLDER, str(tmp_path / "failures"))
    return tmp_path / "failures"


def test_bad_flag_is_data_not_print(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--lora_rnk", "4"]) == 2
    (failure,) = read_failures(folder)
    assert failure.kind == "mistake"
    assert failure.what == "unknown parameter --lora_rnk; did you mean 'lora_rank'?"
    assert failure.where == "the command line"
    assert not failure.may_retry
    assert capsys.readouterr().err == ""


def test_failing_import_is_data(
    folder: Path, values: Values, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "diffsynth_dagster.training.loop", None)
    with pytest.raises(ImportError):
        train(values(), tmp_path / "run")
    (failure,) = read_failures(folder)
    assert failure.kind == "crash"
    assert "diffsynth_dagster.training.loop" in failure.what
    assert "Traceback" in (failure.traceback or "")


def test_the_cause_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stopped process and one that lost its peer say less than the mistake behind both."""
    errors = [Stopped(), RuntimeError("the peer is gone"), ParameterError("wrong", do="mend it")]
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    for process, error in enumerate(errors):
        monkeypatch.setenv("RANK", str(process))
        guard = FailureGuard(WrittenFailures(tmp_path))
        if isinstance(error, RuntimeError):
            with pytest.raises(RuntimeError), guard:
                raise error
        else:
            with guard:
                raise error
            assert guard.code == (130 if process == 0 else 2)
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


def test_no_launcher_no_file(capsys: pytest.CaptureFixture[str]) -> None:
    with FailureGuard(PrintedFailures()) as guard:
        raise ParameterError("wrong", where="here", do="mend it")
    assert guard.code == 2
    assert capsys.readouterr().err == "error: wrong\n  where: here\n  what to do: mend it\n"


def test_folder_that_cannot_be_written(capsys: pytest.CaptureFixture[str]) -> None:
    WrittenFailures(Path("/dev/null/none")).failed(Failure("mistake", "wrong"))
    assert capsys.readouterr().err == "error: wrong\n"
