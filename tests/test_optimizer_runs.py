"""Trainings with the named optimizers, from the command line to the files that they leave."""

import csv
import json
from pathlib import Path

import pytest
import torch
from conftest import Values, make_config, train_to_end
from families.flux.cases import write as write_flux
from families.flux.training import make_values as make_flux
from lora_support import by_module
from process_support import two_processes
from safetensors.torch import load_file
from test_optimizers import TABLE, every_optimizer, optimizers
from test_resume import LONG, contents, never, stop_after

from diffsynth_dagster.run.resume_point import state_folders
from diffsynth_dagster.train import run as run_training
from diffsynth_dagster.training.state import read_state


@every_optimizer
def test_a_stopped_training_ends_with_the_same_files(
    values: Values, tmp_path: Path, name: str
) -> None:
    given = values(**{**LONG, "learning_rate": 1e-2, **TABLE[name]}, optimizer=name)
    train_to_end(given, tmp_path / "undisturbed")
    config = {**given, "output_path": str(tmp_path / "run")}
    stop_after(config, 2, 2)
    run_training(make_config(config), never)
    assert contents(tmp_path / "run") == contents(tmp_path / "undisturbed")
    changed = json.loads((tmp_path / "run" / "run.json").read_text())["changed_tensors"]
    assert changed > 0


def test_the_default_is_adamw_of_torch(values: Values, tmp_path: Path) -> None:
    other = {"customized_optimizer": "torch.optim.AdamW"}
    for name, more in (("default", {}), ("named", {"optimizer": "adamw"}), ("dotted", other)):
        train_to_end(values(**more), tmp_path / name)
    default, named, dotted = (tmp_path / n for n in ("default", "named", "dotted"))
    file = "epoch-0.safetensors"
    assert (default / file).read_bytes() == (named / file).read_bytes()
    one, two = load_file(default / file), load_file(dotted / file)
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_schedule_free_checkpoints_are_the_average(values: Values, tmp_path: Path) -> None:
    """x, of y = (1-β) z + β x (Defazio et al. 2024, arXiv:2405.15682); a state keeps y and z."""
    given = values(num_epochs=4, optimizer="adamw_schedule_free", learning_rate=1e-2)
    run = train_to_end({**given, "optimizer_arguments": {"betas": [0.8, 0.99]}}, tmp_path / "run")
    written = read_state(state_folders(run)[0][1])
    state = written.whole(load_file(written.tensors))
    saved = list(by_module(run / "epoch-3.safetensors", "qwen_image").values())
    zs = [state.pieces["optimizer"]["state"][i]["z"].double() for i in range(len(state.weights))]
    by_size = sorted(saved, key=lambda tensor: float(tensor.double().sum()))
    expected = [
        (y.double() - 0.2 * z) / 0.8 for y, z in zip(state.weights.values(), zs, strict=True)
    ]
    expected.sort(key=lambda tensor: float(tensor.sum()))
    for one, other in zip(by_size, expected, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=1e-7)
    assert any(
        not torch.equal(y, z.float()) for y, z in zip(state.weights.values(), zs, strict=True)
    )


@pytest.fixture(scope="module")
def of_two(tmp_path_factory: pytest.TempPathFactory) -> Values:
    """The parameters of a training of two LoRAs."""
    model = tmp_path_factory.mktemp("flux") / "model"
    write_flux(model)
    make = make_flux(model, tmp_path_factory.mktemp("values"))
    both = {"lora_base_model": "dit,text_encoder", "lora_target_modules": None}
    return lambda **given: make(**both, **given)


def test_each_model_has_its_learning_rate(of_two: Values, tmp_path: Path) -> None:
    """After a step of plain SGD a tensor is its learning rate times its gradient from where it was."""
    rates = {"plain": {}, "named": {"learning_rates": "text_encoder=4e-3"}}
    files: dict[str, dict[str, torch.Tensor]] = {}
    for name, more in rates.items():
        given = of_two(**more, batch_size=8, learning_rate=1e-3, lr_scheduler="linear")
        given |= {"customized_optimizer": "torch.optim.SGD", "weight_decay": 0}
        train_to_end(given, tmp_path / name)
        files[name] = load_file(tmp_path / name / "epoch-0.safetensors")
    changed = {n: t for n, t in files["plain"].items() if "lora_B" in n}
    assert len({name.startswith("text_encoder.") for name in changed}) == 2
    for name, tensor in changed.items():
        factor = 4.0 if name.startswith("text_encoder.") else 1.0
        assert tensor.any()
        torch.testing.assert_close(files["named"][name], factor * tensor)
    (row,) = csv.DictReader((tmp_path / "named" / "metrics.csv").open())
    found = {n: float(v) for n, v in row.items() if n.startswith("learning_rate")}
    assert found == {
        "learning_rate": 1e-3,
        "learning_rate_dit": 1e-3,
        "learning_rate_text_encoder": 4e-3,
    }
    (row,) = csv.DictReader((tmp_path / "plain" / "metrics.csv").open())
    assert [name for name in row if name.startswith("learning_rate")] == ["learning_rate"]


@pytest.mark.parametrize(
    "name",
    [*optimizers("adamw8bit", "adamw_schedule_free"), pytest.param("muon", marks=pytest.mark.soak)],
)
def test_groups_of_two_learning_rates_resume(of_two: Values, tmp_path: Path, name: str) -> None:
    more = {**TABLE[name], "optimizer": name, "learning_rates": {"text_encoder": 1e-3}}
    given = of_two(**{**LONG, "num_epochs": 3, "sample_prompts": [], **more})
    train_to_end(given, tmp_path / "undisturbed")
    config = {**given, "output_path": str(tmp_path / "run")}
    stop_after(config, 2)
    run_training(make_config(config), never)
    undisturbed, run = contents(tmp_path / "undisturbed"), contents(tmp_path / "run")
    assert run == undisturbed
    assert len({row["learning_rate_text_encoder"] for row in run["metrics.csv"]}) > 1 or (
        name == "adamw_schedule_free"
    )


@pytest.mark.soak  # `test_resume_processes.py` does it with the default optimizer
def test_two_processes_then_one(values: Values, tmp_path: Path) -> None:
    """Muon and an average, of two processes and then of one: as one process alone, up to sums."""
    long = {"optimizer": "muon", "ema_sigma_rel": 0.25, "batch_size": 2, "learning_rate": 1e-2}
    accumulated = {**long, "gradient_accumulation_steps": 2}
    train_to_end(values(**accumulated, num_epochs=3), tmp_path / "alone")
    run = tmp_path / "run"
    config = values(**long, num_epochs=2, output_path=str(run))
    done = two_processes(config, tmp_path / "recipe.json")
    assert done.returncode == 0, done.stderr
    train_to_end(values(**accumulated, num_epochs=3), run)
    for epoch in range(3):
        name = f"epoch-{epoch}.safetensors"
        one, other = load_file(tmp_path / "alone" / name), load_file(run / name)
        for tensor in one:
            torch.testing.assert_close(other[tensor], one[tensor], rtol=1e-3, atol=1e-5)
