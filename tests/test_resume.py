"""A training that is stopped goes on exactly where it was: the final files are those of one that was not."""

import errno
import random
import re
import shutil
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Values, make_config, train_to_end, why_refused, write_images
from damage_support import DAMAGE
from safetensors.torch import load_file
from soak_support import result

from diffsynth_dagster.errors import Stopped
from diffsynth_dagster.older import older_runs
from diffsynth_dagster.run.record import RunFile, RunRecord
from diffsynth_dagster.train import run as run_training
from diffsynth_dagster.training.parallel import Parallel
from diffsynth_dagster.training.state import read_state

LONG = {
    "num_epochs": 4,
    "save_steps": 3,
    "lr_scheduler": "cosine",
    "lora_dropout": 0.2,
    "sample_prompts": ["a picture"],
    "sample_num_inference_steps": 1,
    "height": 32,
    "width": 32,
    "enable_csv_log": True,
}
STEPS = 8


def after(run: Path, step: int) -> Callable[[], bool]:
    """Asks to stop once a training has made so many steps."""
    metrics = run / "metrics.csv"
    return lambda: metrics.is_file() and len(metrics.read_text().splitlines()) > step


def never() -> bool:
    return False


def contents(run: Path) -> dict[str, Any]:
    """What a training leaves, without what it took."""
    return {**result(run), "loss.csv": (run / "loss.csv").read_text()}


@pytest.fixture(scope="module")
def undisturbed_run(
    shared_values: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The run folder of a training that was not stopped. Nobody changes it."""
    run = train_to_end({**shared_values, **LONG}, tmp_path_factory.mktemp("undisturbed") / "run")
    return run


@pytest.fixture(scope="module")
def undisturbed(undisturbed_run: Path) -> dict[str, Any]:
    return contents(undisturbed_run)


def stop_after(config: dict[str, Any], *steps: int) -> None:
    """Start a training again and again, and stop it each time after so many steps more."""
    for number in range(len(steps)):
        stop = after(Path(config["output_path"]), sum(steps[: number + 1]))
        with pytest.raises(Stopped):
            run_training(make_config(config), stop)


@pytest.mark.parametrize("steps", [[1], [8], [2, 4], pytest.param([1] * 7, marks=pytest.mark.soak)])
def test_a_stopped_training_ends_with_the_same_files(
    values: Values, tmp_path: Path, undisturbed: dict[str, Any], steps: list[int]
) -> None:
    config = values(**LONG, output_path=str(tmp_path / "run"))
    stop_after(config, *steps)
    record = run_training(make_config(config), never)
    assert contents(tmp_path / "run") == undisturbed
    assert record is not None
    assert record.resumed_from == [sum(steps[: i + 1]) for i in range(len(steps))]


def test_numbers_that_are_read_late_change_no_result(
    values: Values, tmp_path: Path, undisturbed: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A GPU works behind its process, which reads a step after it has given the next one."""
    monkeypatch.setattr(Parallel, "runs_behind", True)
    run = tmp_path / "run"
    config = values(**LONG, output_path=str(run))
    read: list[int] = []

    def counting() -> bool:
        """Asked at the end of each step, before and after what there is to read is read."""
        metrics = run / "metrics.csv"
        read.append(len(metrics.read_text().splitlines()) - 1 if metrics.is_file() else 0)
        return False

    stop_after(config, 1)
    assert read_state(run / "state" / "step-2").step == 2  # the step after the one that was read
    run_training(make_config({**config, "dataset_num_workers": 1}), counting)
    assert contents(run) == undisturbed
    # Step 3 is read for its checkpoint and its sample, which ask too; step 4 after 5 was given.
    assert read[2:9] == [2, 3, 3, 3, 3, 3, 4]


def refusal(config: dict[str, Any], *flags: str) -> str:
    """What the command line says of a training that it refuses."""
    return why_refused(config, Path(config["output_path"]), *flags)


def go_on(config: dict[str, Any]) -> RunRecord:
    """Train to the end; returns the record."""
    record = run_training(make_config(config), never)
    assert record is not None
    return record


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"learning_rate": 1e-4}, r"differs in: learning_rate \(was 0.001\)"),
        ({"lora_rank": 2}, r"differs in: lora_rank \(was 4\)"),
        ({"seed": 1, "weight_decay": 0.0}, r"seed \(was 0\), weight_decay"),
        ({"num_epochs": 1}, r"on which the learning rate depends \(2, and it was 8\)"),
        (
            {"batch_size": 2},
            r"the samples of each step \(batch_size, or gradient_accumulation_steps",
        ),
        ({"batch_size": 2, "gradient_accumulation_steps": 2}, "the samples of each step"),
    ],
)
def test_a_state_of_another_training_is_refused_and_stays(
    values: Values, tmp_path: Path, change: dict[str, Any], words: str
) -> None:
    config = values(**LONG, output_path=str(tmp_path / "run"))
    stop_after(config, 3)
    before = {p: p.read_bytes() for p in (tmp_path / "run" / "state").rglob("*") if p.is_file()}
    said = refusal({**config, **change})
    assert re.search(words, said), said
    assert "never" in said
    assert {p: p.read_bytes() for p in before} == before
    if "num_epochs" not in change:  # what it would take: the same again
        go_on(config)


def test_the_precision_is_compared_wherever_it_was_asked_for(
    values: Values, tmp_path: Path
) -> None:
    """The launcher's counts where the config has none."""
    config = values(**LONG, output_path=str(tmp_path / "run"))
    assert config.get("mixed_precision") is None
    stop_after(config, 1)
    state = read_state(tmp_path / "run" / "state" / "step-1")
    assert state.identity["mixed_precision"] == "no"


def test_other_data_and_weights_are_named(values: Values, tmp_path: Path) -> None:
    config = values(**LONG, output_path=str(tmp_path / "run"))
    stop_after(config, 3)
    data = write_images(tmp_path / "data", 5)
    moved = {"dataset_base_path": str(data), "dataset_metadata_path": str(data / "metadata.csv")}
    assert "differs in: the samples" in refusal({**config, **moved})


def test_what_affects_no_result_may_change(
    values: Values, tmp_path: Path, undisturbed: dict[str, Any]
) -> None:
    config = values(**LONG, output_path=str(tmp_path / "run"))
    stop_after(config, 3)
    moved = shutil.move(tmp_path / "run", tmp_path / "moved")
    other = {"dataset_num_workers": 1, "state_steps": 2, "state_keep": 5, "output_path": str(moved)}
    go_on({**config, **other})
    assert contents(Path(moved)) == undisturbed


def test_more_epochs_go_on_where_fewer_ended(values: Values, tmp_path: Path) -> None:
    long = {**LONG, "lr_scheduler": "constant", "save_steps": None}
    train_to_end(values(**long), tmp_path / "whole")
    config = values(**{**long, "num_epochs": 2}, output_path=str(tmp_path / "run"))
    go_on(config)
    record = go_on({**config, "num_epochs": 4})
    assert record.resumed_from == [4]
    assert list(record.checkpoints) == [f"epoch-{n}.safetensors" for n in range(4)]
    for name in record.checkpoints:
        whole, longer = (load_file(tmp_path / run / name) for run in ("whole", "run"))
        assert all(torch.equal(whole[tensor], longer[tensor]) for tensor in whole)


def test_a_finished_training_ends_at_once(
    values: Values, tmp_path: Path, undisturbed_run: Path, undisturbed: dict[str, Any]
) -> None:
    run = shutil.copytree(undisturbed_run, tmp_path / "run")
    record = go_on(values(**LONG, output_path=str(run)))
    assert record.resumed_from == [STEPS]
    assert contents(run) == undisturbed


@pytest.mark.parametrize(("save_steps", "last"), [(3, 3), (None, 4)])
def test_each_checkpoint_has_a_state(
    values: Values, tmp_path: Path, save_steps: int | None, last: int
) -> None:
    """So a kill costs no more than what came after it."""
    config = values(**{**LONG, "save_steps": save_steps}, output_path=str(tmp_path / "run"))
    stop_after(config, 5)
    shutil.rmtree(tmp_path / "run" / "state" / "step-5")  # a kill leaves none
    assert go_on(config).resumed_from == [last]


def test_samples_that_were_changed_are_named_and_not_made_again(
    values: Values,
    tmp_path: Path,
    undisturbed_run: Path,
    undisturbed: dict[str, Any],
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = shutil.copytree(undisturbed_run, tmp_path / "run")
    first, second, *_ = sorted((run / "samples").glob("*.png"))
    first.unlink()
    second.write_bytes(second.read_bytes()[:30])
    go_on(values(**LONG, output_path=str(run)))
    said = capsys.readouterr().err
    assert f"missing or were changed since\n  where: {first}, {second}\n" in said
    assert len(second.read_bytes()) == 30
    shown = {f"samples/{path.name}" for path in (first, second)}
    whole = {name: content for name, content in undisturbed.items() if name not in shown}
    assert {name: contents(run)[name] for name in whole} == whole


def test_a_training_from_the_beginning_lies_alone_beside_the_older_one(
    values: Values, tmp_path: Path
) -> None:
    config = values(**LONG, output_path=str(tmp_path / "run"))
    go_on(config)
    before = contents(tmp_path / "run")
    mine = tmp_path / "run" / "step-3-mine.safetensors"
    mine.write_bytes(b"a file of the user's")
    fresh = {**config, "num_epochs": 1, "save_steps": None, "sample_prompts": [], "resume": "never"}
    record = go_on(fresh)
    assert record.resumed_from == []
    assert mine.exists()
    found = {p.name for p in (tmp_path / "run").glob("*.safetensors")}
    assert found == {"epoch-0.safetensors", mine.name}
    assert not list((tmp_path / "run" / "samples").glob("*"))
    assert [p.name for p in (tmp_path / "run" / "state").iterdir()] == ["step-2"]
    (older,) = older_runs(tmp_path / "run")
    assert contents(older) == before
    assert [p.name for p in (older / "state").iterdir()] == [f"step-{STEPS}"]


def test_there_must_be_a_state(values: Values, tmp_path: Path) -> None:
    config = values(**LONG, output_path=str(tmp_path / "run"), resume="must")
    assert "there is no whole state to go on from" in refusal(config)


@pytest.mark.parametrize(
    ("file", "how"),
    [*product(["state.json"], DAMAGE[::2]), *product(["tensors.safetensors"], DAMAGE[1:])],
)
def test_a_damaged_state_is_named_and_an_older_one_taken(
    values: Values,
    tmp_path: Path,
    undisturbed: dict[str, Any],
    capsys: pytest.CaptureFixture[str],
    file: str,
    how: Callable[[bytes, random.Random], bytes],
) -> None:
    config = values(**LONG, output_path=str(tmp_path / "run"), state_steps=2)
    stop_after(config, 5)
    assert sorted(p.name for p in (tmp_path / "run" / "state").iterdir()) == ["step-4", "step-5"]
    path = tmp_path / "run" / "state" / "step-5" / file
    path.write_bytes(how(path.read_bytes(), random.Random(0)))
    record = go_on(config)
    assert record.resumed_from == [4]
    assert f"where: {path.parent}; an older state is looked for" in capsys.readouterr().err
    assert contents(tmp_path / "run") == undisturbed


def test_a_checkpoint_that_was_changed_is_made_again(
    values: Values, tmp_path: Path, undisturbed: dict[str, Any]
) -> None:
    config = values(**LONG, output_path=str(tmp_path / "run"), state_steps=2, state_keep=3)
    stop_after(config, 4)
    (tmp_path / "run" / "step-3.safetensors").write_bytes(b"something else")
    record = go_on(config)
    assert record.resumed_from == [2]
    assert contents(tmp_path / "run") == undisturbed


@pytest.mark.parametrize("is_there", [False, True])
def test_what_is_older_than_every_state_costs_no_step(
    values: Values,
    tmp_path: Path,
    undisturbed: dict[str, Any],
    capsys: pytest.CaptureFixture[str],
    is_there: bool,
) -> None:
    """A checkpoint that someone removed, to make space, or changed: the training goes on without it."""
    config = values(**LONG, output_path=str(tmp_path / "run"))
    stop_after(config, 4)
    file = tmp_path / "run" / "step-3.safetensors"
    file.write_bytes(b"something else") if is_there else file.unlink()
    record = go_on(config)
    assert record.resumed_from == [4]
    said = capsys.readouterr().err
    assert ("which is removed and not made again" if is_there else "were removed since") in said
    assert list(record.checkpoints) == ["step-6.safetensors", "step-8.safetensors"]
    assert not file.exists()
    last = (tmp_path / "run" / "step-8.safetensors").read_bytes()
    assert last == undisturbed["step-8.safetensors"]


def test_a_state_that_cannot_be_read_now_is_no_reason_to_begin_anew(
    values: Values, tmp_path: Path, undisturbed: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = values(**LONG, output_path=str(tmp_path / "run"))
    stop_after(config, 4)

    def fails(path: Path) -> str:
        raise OSError(errno.EIO, "Input/output error", str(path))

    with monkeypatch.context() as patch:
        patch.setattr("diffsynth_dagster.training.state.digest_file", fails)
        assert "a state of the training cannot be read" in refusal(config)
    go_on(config)
    assert contents(tmp_path / "run") == undisturbed


def test_deepspeed_is_refused_the_state_of_a_training_without_it(
    values: Values, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = values(**LONG, output_path=str(tmp_path / "run"))
    stop_after(config, 4)
    monkeypatch.setattr(Parallel, "can_save_state", False)
    assert "differs in: DeepSpeed, which keeps the optimizer's state in parts" in refusal(config)


def test_no_file_is_left_that_a_killed_training_did_not_come_to_name(
    values: Values, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It dies when a checkpoint is written, and its record not yet."""
    config = values(**LONG, output_path=str(tmp_path / "run"))

    def dies(*_: object) -> None:
        raise Stopped

    with monkeypatch.context() as patch:
        patch.setattr(RunFile, "saved", dies)
        with pytest.raises(Stopped):
            go_on(config)
    assert (tmp_path / "run" / "step-3.safetensors").is_file()
    record = go_on({**config, "resume": "never", "save_steps": 4})
    files = [p.name for p in (tmp_path / "run").glob("*.safetensors")]
    assert (
        sorted(files) == sorted(record.checkpoints) == ["step-4.safetensors", "step-8.safetensors"]
    )


def test_states_can_be_switched_off(values: Values, tmp_path: Path) -> None:
    config = values(**LONG, output_path=str(tmp_path / "run"), state_minutes=0)
    stop_after(config, 4)
    assert not (tmp_path / "run" / "state").exists()


@pytest.mark.parametrize(
    "stops", [[], [4], [7, 1], pytest.param([2, 2, 2], marks=pytest.mark.soak)]
)
def test_the_newest_checkpoints_are_kept(
    values: Values, tmp_path: Path, undisturbed_run: Path, stops: list[int]
) -> None:
    config = values(**LONG, output_path=str(tmp_path / "run"), save_keep=1)
    stop_after(config, *stops)
    record = go_on(config)
    assert list(record.checkpoints) == ["step-8.safetensors"]
    (kept,) = (tmp_path / "run").glob("*.safetensors")
    expected = load_file(undisturbed_run / kept.name)
    assert load_file(kept).keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in load_file(kept).items())
