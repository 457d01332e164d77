"""`max_train_steps` says how long a training is, also where it ends within an epoch."""

import csv
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import Values, make_config, record_of
from safetensors.torch import load_file
from soak_support import result
from test_resume import never, refusal, stop_after

from diffsynth_dagster.config.flags import read_arguments
from diffsynth_dagster.errors import ParameterError
from diffsynth_dagster.run.record import read_record
from diffsynth_dagster.train import run as run_training

# Two steps to an epoch.
GIVEN = {
    "lr_scheduler": "linear",
    "lora_dropout": 0.2,
    "validation_split": 1,
    "sample_prompts": ["a picture"],
    "sample_num_inference_steps": 1,
    "height": 32,
    "width": 32,
}


def trained(config: dict[str, Any], run: Path, **more: Any) -> Path:
    run_training(make_config({**config, **more, "output_path": str(run)}), never)
    return run


def rates(run: Path) -> list[float]:
    with (run / "metrics.csv").open() as file:
        return [float(row["learning_rate"]) for row in csv.DictReader(file)]


def same_weights(one: Path, other: Path) -> bool:
    a, b = load_file(one), load_file(other)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_as_many_steps_as_epochs_have_are_the_same_training(values: Values, tmp_path: Path) -> None:
    epochs = trained(values(**GIVEN, num_epochs=2), tmp_path / "epochs")
    steps = trained(values(**GIVEN, max_train_steps=4), tmp_path / "steps")
    names = ["epoch-0.safetensors", "epoch-1.safetensors"]
    assert sorted(path.name for path in steps.glob("*.safetensors")) == names
    for name in names:
        assert same_weights(epochs / name, steps / name)
    assert rates(steps) == rates(epochs)
    pictures = [sorted((run / "samples").glob("*.png")) for run in (epochs, steps)]
    assert [p.name for p in pictures[0]] == [p.name for p in pictures[1]]
    assert all(a.read_bytes() == b.read_bytes() for a, b in zip(*pictures, strict=True))


def test_it_ends_within_an_epoch_and_goes_on_as_undisturbed(values: Values, tmp_path: Path) -> None:
    """The schedule, the held-out loss, samples and the last checkpoint are of the last step."""
    config = values(**GIVEN, max_train_steps=5)
    whole = trained(config, tmp_path / "whole")
    record = record_of(whole)
    assert (record.total_steps, record.steps) == (5, 5)
    assert list(record.checkpoints) == [
        "epoch-0.safetensors",
        "epoch-1.safetensors",
        "step-5.safetensors",
    ]
    assert record.newest == ["step-5.safetensors"]
    assert [measured["step"] for measured in record.held_out] == [0, 2, 4, 5]
    assert (whole / "samples" / "step-5.png").is_file()
    rate = config["learning_rate"]
    assert rates(whole) == pytest.approx([rate * (1 - n / 5) for n in range(5)])
    stop_after({**config, "output_path": str(tmp_path / "run")}, 1, 2)
    assert result(trained(config, tmp_path / "run")) == result(whole)


def test_a_longer_training_goes_on_where_a_shorter_one_ended(
    values: Values, tmp_path: Path
) -> None:
    config = values(**{**GIVEN, "lr_scheduler": "constant"}, output_path=str(tmp_path / "run"))
    trained(config, tmp_path / "run", max_train_steps=3)
    trained(config, tmp_path / "run", max_train_steps=5)
    record = record_of(tmp_path / "run")
    assert record.resumed_from == [3]
    whole = trained(config, tmp_path / "whole", num_epochs=3)
    assert same_weights(tmp_path / "run" / "epoch-1.safetensors", whole / "epoch-1.safetensors")
    trained(config, tmp_path / "run", num_epochs=3)
    assert same_weights(tmp_path / "run" / "epoch-2.safetensors", whole / "epoch-2.safetensors")
    stop_after({**config, "max_train_steps": 8}, 7)
    said = refusal({**config, "max_train_steps": 4})
    assert "max_train_steps (7 steps are made, and it gives 4)" in said


def test_one_of_both_says_how_long_it_is(values: Values) -> None:
    with pytest.raises(ParameterError, match="both say how long the training is"):
        make_config(values(num_epochs=2, max_train_steps=4))


@pytest.mark.parametrize("made", [3, 1])
def test_a_training_that_is_shortened_to_what_it_made_leaves_its_last_checkpoint(
    values: Values, tmp_path: Path, made: int
) -> None:
    config = values(**{**GIVEN, "lr_scheduler": "constant"}, output_path=str(tmp_path / "run"))
    stop_after({**config, "max_train_steps": 8}, made)
    run = trained(config, tmp_path / "run", max_train_steps=made)
    whole = trained(config, tmp_path / "whole", max_train_steps=made)
    record, expected = read_record(run), read_record(whole)
    assert record is not None
    assert expected is not None
    assert record.finished
    assert list(record.checkpoints) == list(expected.checkpoints)
    assert [each["step"] for each in record.held_out] == [
        each["step"] for each in expected.held_out
    ]
    name = f"step-{made}.safetensors"
    assert same_weights(run / name, whole / name)
    assert (run / "samples" / f"step-{made}.png").is_file()
    longer = trained(config, tmp_path / "run", max_train_steps=5)
    assert (longer / "step-5.safetensors").is_file()


def test_a_choice_of_the_command_line_takes_the_place_of_the_other(
    values: Values, tmp_path: Path
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({**values(max_train_steps=2000)}))
    for epochs in (1, 3):
        config = read_arguments(["--recipe", str(recipe), "--num_epochs", str(epochs)]).config
        assert (config.num_epochs, config.max_train_steps) == (epochs, None)
    recipe.write_text(yaml.safe_dump({**values(num_epochs=7)}))
    config = read_arguments(["--recipe", str(recipe), "--max_train_steps", "5"]).config
    assert (config.num_epochs, config.max_train_steps) == (1, 5)
