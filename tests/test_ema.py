"""The average of the weights is the one of the formula, and it is what is saved and shown."""

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Values, make_config, train_to_end
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from test_resume import LONG, contents, never, stop_after

from diffsynth_dagster.train import run as run_training
from diffsynth_dagster.training.ema import AverageOfOptimizer, PowerAverage, gamma_of

STEPS = 8
EVERY_STEP = {"num_epochs": 4, "save_steps": 1}
FULL = {"trainable_models": ["dit"], "remove_prefix_in_ckpt": "pipe.dit.", "learning_rate": 1e-3}


def gamma(sigma_rel: float) -> float:
    """By bisection on the standard deviation of the density (γ+1) t^γ on [0, 1]."""

    def deviation(power: float) -> float:
        mean = (power + 1) / (power + 2)
        return ((power + 1) / (power + 3) - mean**2) ** 0.5

    low, high = 0.0, 1e6
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if deviation(middle) > sigma_rel else (low, middle)
    return low


def profile(steps: int, power: float) -> np.ndarray[Any, Any]:
    """Weight of the weights after each step."""
    edges = (np.arange(steps + 1, dtype=np.float64) / steps) ** (power + 1)
    return np.diff(edges)


@pytest.mark.parametrize(("sigma_rel", "known"), [(0.05, 16.97), (0.1, 6.94)])
def test_gamma_is_that_of_the_paper(sigma_rel: float, known: float) -> None:
    """The values that the paper gives for the two profiles that it keeps."""
    assert gamma_of(sigma_rel) == pytest.approx(known, abs=0.005)


@given(st.floats(0.001, 0.2886))
def test_gamma_has_the_standard_deviation(sigma_rel: float) -> None:
    assert gamma_of(sigma_rel) == pytest.approx(gamma(sigma_rel), rel=1e-6, abs=1e-6)


@given(st.floats(0.01, 0.28), st.integers(1, 60), st.integers(0, 2**31))
def test_the_average_is_the_sum_of_the_trajectory(sigma_rel: float, steps: int, seed: int) -> None:
    trajectory = np.random.default_rng(seed).normal(size=(steps, 5)).cumsum(0)
    parameter = torch.nn.Parameter(torch.full((5,), 3.0))
    average = PowerAverage({"w": parameter}, sigma_rel)
    assert torch.equal(average.weights["w"], parameter)
    for step, weights in enumerate(trajectory, start=1):
        with torch.no_grad():
            parameter.copy_(torch.from_numpy(weights))
        average.update(step)
    expected = profile(steps, gamma(sigma_rel)) @ trajectory
    scale = np.abs(trajectory).max()
    assert np.abs(average.weights["w"].numpy() - expected).max() < 1e-6 * scale


def test_the_weights_come_back_bit_by_bit() -> None:
    parameters = {n: torch.nn.Parameter(torch.randn(3, 4)) for n in ("a", "b")}
    average = PowerAverage(parameters, 0.1)
    with torch.no_grad():
        for parameter in parameters.values():
            parameter.mul_(1.7)
    before = {n: p.detach().clone() for n, p in parameters.items()}
    kept = {n: w.clone() for n, w in average.weights.items()}
    places = {n: p.data_ptr() for n, p in parameters.items()}

    def fail() -> None:
        with average.in_place():
            assert all(torch.equal(parameters[n], kept[n]) for n in kept)
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    for name, parameter in parameters.items():
        assert torch.equal(parameter, before[name])
        assert torch.equal(average.weights[name], kept[name])
        assert parameter.data_ptr() == places[name]


def test_a_schedule_free_optimizer_is_disturbed_by_nothing() -> None:
    from schedulefree import AdamWScheduleFree

    def trained(looks: bool) -> tuple[torch.Tensor, torch.Tensor]:
        parameter = torch.nn.Parameter(torch.linspace(-1, 1, 7))
        optimizer: Any = AdamWScheduleFree([parameter], lr=0.1)
        optimizer.train()
        average = AverageOfOptimizer({"w": parameter}, optimizer)
        for _ in range(20):
            if looks:
                with average.in_place():
                    pass
            (parameter**2).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        with average.in_place():
            seen = parameter.detach().clone()
        return parameter.detach(), seen

    (one, seen), (other, seen_too) = trained(False), trained(True)
    assert torch.equal(one, other)
    assert torch.equal(seen, seen_too)
    assert not torch.equal(one, seen)


def averaged(run: Path, steps: int, sigma_rel: float) -> dict[str, np.ndarray[Any, Any]]:
    """The average of the checkpoints that a training without one left after each step."""
    files = [load_file(run / f"step-{step}.safetensors") for step in range(1, steps + 1)]
    weights = profile(steps, gamma(sigma_rel))
    return {
        name: sum(w * f[name].double().numpy() for w, f in zip(weights, files, strict=True))
        for name in files[0]
    }


@pytest.mark.parametrize("trained", [{}, FULL], ids=["lora", "full"])
def test_checkpoints_are_the_average(
    values: Values, tmp_path: Path, trained: dict[str, Any]
) -> None:
    train_to_end(values(**EVERY_STEP, **trained), tmp_path / "plain")
    given = values(**EVERY_STEP, **trained, ema_sigma_rel=0.25)
    train_to_end(given, tmp_path / "average")
    for step in (1, 3, STEPS):
        found = load_file(tmp_path / "average" / f"step-{step}.safetensors")
        for name, expected in averaged(tmp_path / "plain", step, 0.25).items():
            scale = np.abs(expected).max()
            assert np.abs(found[name].double().numpy() - expected).max() <= 1e-6 * scale, name
    rows = [
        list(csv.DictReader((tmp_path / n / "metrics.csv").open())) for n in ("plain", "average")
    ]
    assert [r["loss"] for r in rows[0]] == [r["loss"] for r in rows[1]]


def test_pictures_show_the_average(values: Values, tmp_path: Path) -> None:
    """A profile so narrow that the last step alone counts is none; a wide one shows."""
    runs = {"plain": {}, "narrow": {"ema_sigma_rel": 0.001}, "wide": {"ema_sigma_rel": 0.28}}
    long = {**LONG, "learning_rate": 0.1, "lr_scheduler": "constant"}
    found: dict[str, dict[str, Any]] = {}
    for name, more in runs.items():
        train_to_end(values(**long, **more), tmp_path / name)
        found[name] = contents(tmp_path / name)
    pictures = [f"samples/step-{step}.png" for step in (0, 3, 6, 8)]
    assert all(found["plain"][p] == found["narrow"][p] for p in pictures)
    assert found["plain"]["samples/step-0.png"] == found["wide"]["samples/step-0.png"]
    assert all(found["plain"][p] != found["wide"][p] for p in pictures[1:])


@pytest.mark.parametrize("steps", [[1], [3], [2, 4]])
def test_a_stopped_training_ends_with_the_same_average(
    values: Values, tmp_path: Path, steps: list[int]
) -> None:
    given = values(**LONG, ema_sigma_rel=0.2)
    train_to_end(given, tmp_path / "undisturbed")
    config = {**given, "output_path": str(tmp_path / "run")}
    stop_after(config, *steps)
    run_training(make_config(config), never)
    assert contents(tmp_path / "run") == contents(tmp_path / "undisturbed")
