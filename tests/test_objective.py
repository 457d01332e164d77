"""Schedules against diffusers' scheduler, weights against the formula, noise against its promise."""

import math

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from hypothesis import given
from hypothesis import strategies as st

from diffsynth_dagster.config import TrainingConfig
from diffsynth_dagster.families.qwen_image.family import SCHEDULER, TRAINING_MU, noising
from diffsynth_dagster.objective.loss import sample_losses
from diffsynth_dagster.objective.noise import noise, timestep_index


def test_qwen_schedule_is_that_of_the_published_scheduler() -> None:
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(SCHEDULER)
    linear = torch.linspace(1.0, 0.001, 1000, dtype=torch.float64).numpy()
    scheduler.set_timesteps(sigmas=linear, mu=TRAINING_MU)
    flow = noising(TrainingConfig(), {})
    assert len(flow.sigmas) == 1000
    torch.testing.assert_close(flow.sigmas, scheduler.sigmas[:-1].float(), atol=2e-6, rtol=0)
    torch.testing.assert_close(flow.timesteps, scheduler.timesteps.float(), atol=2e-3, rtol=0)


def test_weights_follow_the_formula() -> None:
    flow = noising(TrainingConfig(), {})
    y = [math.exp(-2 * ((float(t) - 500) / 1000) ** 2) for t in flow.timesteps]
    total = sum(value - min(y) for value in y)
    for index in (0, 1, 300, 500, 999):
        expected = (y[index] - min(y)) * 1000 / total
        assert float(flow.weights[index]) == pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_path_goes_from_data_to_noise() -> None:
    flow = noising(TrainingConfig(), {})
    x_0, epsilon = torch.randn(2, 3), torch.randn(2, 3)
    index = torch.tensor([999, 0])
    x_t = flow.noised(x_0, epsilon, index)
    assert float((x_t[0] - x_0[0]).abs().max()) <= 0.05
    torch.testing.assert_close(x_t[1], epsilon[1])
    # One Euler step of the predicted velocity from any sigma back to 0 gives the data.
    middle = torch.tensor([300, 700])
    sigma, velocity = flow.sigmas[middle][:, None], flow.target(x_0, epsilon, middle)
    torch.testing.assert_close(flow.noised(x_0, epsilon, middle) - sigma * velocity, x_0)


@given(st.integers(0, 2**62), st.text(min_size=1), st.integers(0, 10**6))
def test_noise_depends_on_nothing_but_its_arguments(seed: int, sample: str, visit: int) -> None:
    first = noise(seed, sample, visit, "image", (4, 3))
    torch.manual_seed(seed % 1000)
    torch.randn(5)
    assert torch.equal(first, noise(seed, sample, visit, "image", (4, 3)))
    assert not torch.equal(first, noise(seed, sample, visit + 1, "image", (4, 3)))
    assert 10 <= timestep_index(seed, sample, visit, 10, 20) < 20


def test_timesteps_are_uniform_and_noise_is_normal() -> None:
    drawn = [timestep_index(0, "a", visit, 0, 10) for visit in range(5000)]
    counts = torch.bincount(torch.tensor(drawn), minlength=10)
    assert counts.min() > 400
    assert counts.max() < 600
    values = torch.cat([noise(0, "a", visit, "image", (1000,)) for visit in range(20)])
    assert abs(float(values.mean())) < 0.02
    assert float(values.std()) == pytest.approx(1.0, abs=0.02)


def test_known_regions_do_not_count() -> None:
    prediction, target = torch.zeros(1, 2, 2), torch.tensor([[[1.0, 1.0], [5.0, 5.0]]])
    known = torch.tensor([[[0.0, 0.0], [1.0, 1.0]]])
    weight = torch.tensor([2.0])
    assert float(sample_losses(prediction, target, weight, known)) == 2.0
    assert float(sample_losses(prediction, target, weight)) == 26.0
