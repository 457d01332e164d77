"""`run.json` says what is true at every moment, also when the training breaks off."""

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Values, make_config, record_of, train, train_to_end

from diffsynth_dagster.facts import digest_file
from diffsynth_dagster.run.record import RunRecord, read_record
from diffsynth_dagster.training.periodic import SavePoints

Closure = Any


class BreaksInStep2(torch.optim.SGD):
    """An optimizer with a bug."""

    made = 0

    def step(self, closure: Closure = None) -> None:  # type: ignore[override]
        self.made += 1
        if self.made == 2:
            raise ZeroDivisionError
        super().step(closure)


class LooksAtRunJson(torch.optim.SGD):
    """An optimizer that keeps what `run.json` says before each step."""

    folder = Path()
    said: list[RunRecord] = []  # noqa: RUF012

    def step(self, closure: Closure = None) -> None:  # type: ignore[override]
        record = record_of(self.folder)
        self.said.append(record)
        super().step(closure)


@pytest.fixture
def watched(tmp_path: Path) -> list[RunRecord]:
    LooksAtRunJson.folder, LooksAtRunJson.said = tmp_path / "run", []
    return LooksAtRunJson.said


def names_of(record: RunRecord | None, folder: Path) -> list[str]:
    """The checkpoints that a record names, each with the digest of its file."""
    assert record is not None
    for name, digest in record.checkpoints.items():
        assert digest_file(folder / name) == digest
    return list(record.checkpoints)


def test_after_a_crash_it_names_the_checkpoints_that_are_there(
    values: Values, tmp_path: Path
) -> None:
    config = values(
        customized_optimizer="test_run_record.BreaksInStep2", weight_decay=0, save_steps=1
    )
    with pytest.raises(ZeroDivisionError):
        train(config, tmp_path / "run")
    record = read_record(tmp_path / "run")
    assert names_of(record, tmp_path / "run") == ["step-1.safetensors"]
    assert record is not None
    assert not record.finished
    assert record.final_loss is not None


def test_a_checkpoint_is_named_as_soon_as_it_is_written(
    values: Values, tmp_path: Path, watched: list[RunRecord]
) -> None:
    config = values(
        customized_optimizer="test_run_record.LooksAtRunJson",
        weight_decay=0,
        save_steps=1,
        resume="never",
    )
    run = tmp_path / "run"
    for _ in range(2):  # the second time over the record of a finished training
        watched.clear()
        train_to_end(config, run)
        assert [list(record.checkpoints) for record in watched] == [[], ["step-1.safetensors"]]
        assert not any(record.finished for record in watched)
        record = read_record(run)
        assert names_of(record, run) == ["step-1.safetensors", "step-2.safetensors"]
        assert record is not None
        assert record.finished
        assert record.trained_tensors >= record.changed_tensors > 0


@pytest.mark.parametrize(
    ("save_steps", "expected"),
    [
        (None, {3: "epoch-0", 6: "epoch-1"}),
        (2, {2: "step-2", 4: "step-4", 6: "step-6"}),
        (4, {4: "step-4", 6: "step-6"}),
    ],
)
def test_the_last_step_always_leaves_a_checkpoint(
    values: Values, save_steps: int | None, expected: dict[int, str]
) -> None:
    points = SavePoints(make_config(values(save_steps=save_steps)), 3, 6)
    named = {step: points.name(step) for step in range(7)}
    assert {step: name for step, name in named.items() if name is not None} == expected
