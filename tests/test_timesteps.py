"""How timesteps are drawn: against closed forms, numerical integrals and the sampler of diffusers."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Values, make_config, train_to_end
from diffusers.training_utils import compute_density_for_timestep_sampling
from hypothesis import given
from hypothesis import strategies as st

from diffsynth_dagster.config import TrainingConfig
from diffsynth_dagster.dry_run import make_plan
from diffsynth_dagster.errors import ParameterError
from diffsynth_dagster.families import find_family
from diffsynth_dagster.families.contract import Denoiser, Family
from diffsynth_dagster.families.denoiser_schedule import Share, share_of_step
from diffsynth_dagster.objective.flow import linear_shift, linear_sigmas
from diffsynth_dagster.objective.noise import timestep_index
from diffsynth_dagster.objective.timesteps import (
    Density,
    draw_index,
    even_edges,
    mass,
    scaled_edges,
    shifted_edges,
)
from diffsynth_dagster.weights.resolved import resolve

DRAWS = 2000
CELLS = 20


def logit_normal(t: np.ndarray, m: float, s: float) -> np.ndarray:
    """Equation 19 of the paper."""
    logit = np.log(t / (1 - t))
    return np.exp(-((logit - m) ** 2) / (2 * s**2)) / (s * math.sqrt(2 * math.pi) * t * (1 - t))


def mode(t: np.ndarray, scale: float) -> np.ndarray:
    """|d f^-1(t) / dt|, by differences of the f of the paper on a fine grid."""
    u = np.linspace(0, 1, 200_001)
    f = 1 - u - scale * (np.cos(np.pi * u / 2) ** 2 - 1 + u)
    return np.interp(t, f[::-1], np.abs(np.gradient(u, f))[::-1])


DENSITIES: list[tuple[Density, Callable[[np.ndarray], np.ndarray]]] = [
    (Density("uniform"), np.ones_like),
    (Density("logit_normal"), lambda t: logit_normal(t, 0.0, 1.0)),
    (Density("logit_normal", 0.5, 0.6), lambda t: logit_normal(t, 0.5, 0.6)),
    (Density("mode"), lambda t: mode(t, 1.29)),
    (Density("mode", mode_scale=-0.8), lambda t: mode(t, -0.8)),
]
every_density = pytest.mark.parametrize(("density", "formula"), DENSITIES)


def expected_parts(
    formula: Callable[[np.ndarray], np.ndarray], low: float, high: float
) -> np.ndarray:
    """How much of a density lies in each of `CELLS` equal parts of [low, high], by integration."""
    parts: list[float] = []
    for cell in range(CELLS):
        ends = [low + (high - low) * (cell + i) / CELLS for i in range(2)]
        t = np.linspace(*ends, 4002)
        t = (t[:-1] + t[1:]) / 2
        parts.append(float(formula(t).mean() * (ends[1] - ends[0])))
    return np.array(parts)


def chi_square(counts: np.ndarray, expected: np.ndarray) -> float:
    return float(((counts - expected) ** 2 / expected).sum())


@every_density
@pytest.mark.parametrize("share", [(0, 1000), (417, 1000), (100, 300)])
def test_draws_follow_the_density_in_a_share(
    density: Density, formula: Callable[[np.ndarray], np.ndarray], share: tuple[int, int]
) -> None:
    """Chi-square with 19 degrees of freedom: it is above 43.8 once in a thousand times."""
    edges = even_edges(1000)
    drawn = [draw_index(3, "a", visit, share, density, edges) for visit in range(DRAWS)]
    assert min(drawn) >= share[0]
    assert max(drawn) < share[1]
    # Index i is the place 1 - i / 1000 and what is below it, so that the first has the most noise.
    counts, _ = np.histogram(drawn, CELLS, (share[0], share[1]))
    parts = expected_parts(formula, 1 - share[1] / 1000, 1 - share[0] / 1000)[::-1]
    assert chi_square(counts, DRAWS * parts / parts.sum()) < 43.8
    assert mass(density, edges, *share) == pytest.approx(parts.sum(), rel=1e-3)


@every_density
def test_the_quantile_is_the_inverse(density: Density, formula: Any) -> None:
    p = torch.linspace(0.001, 0.999, 97, dtype=torch.float64)
    torch.testing.assert_close(density.below(density.quantile(p)), p, atol=1e-9, rtol=0)
    ends = torch.tensor([0.0, 1.0], dtype=torch.float64)
    torch.testing.assert_close(density.below(ends), ends, atol=1e-9, rtol=0)


@pytest.mark.parametrize(
    ("scheme", "density"),
    [("logit_normal", Density("logit_normal", 0.4, 0.8)), ("mode", Density("mode"))],
)
def test_diffusers_draws_the_same_from_the_other_end(scheme: str, density: Density) -> None:
    """Its number is a place in a schedule that begins with the most noise."""
    source = torch.Generator().manual_seed(0)
    theirs = compute_density_for_timestep_sampling(
        scheme, 50_000, logit_mean=-0.4, logit_std=0.8, mode_scale=1.29, generator=source
    )
    p = (torch.arange(50_000, dtype=torch.float64) + 0.5) / 50_000
    ours = 1.0 - density.quantile(p).flip(0)
    # Kolmogorov-Smirnov: above 1.95 / sqrt(n) once in a thousand times.
    assert float((theirs.double().sort().values - ours).abs().max()) < 0.05
    ranks = torch.searchsorted(ours, theirs.double().sort().values) / 50_000
    assert float((ranks - p).abs().max()) < 1.95 / math.sqrt(50_000)


def test_the_shift_of_a_schedule_in_its_own_place_changes_nothing() -> None:
    for shift in (1.0, 3.0, 5.0):
        sigmas = linear_shift(linear_sigmas(), shift)
        cells = -shifted_edges(sigmas, shift).diff()
        # But that a cell reaches half way to its neighbours.
        torch.testing.assert_close(
            cells[2:-2], torch.full((996,), 1e-3).double(), rtol=2e-2, atol=0
        )
        torch.testing.assert_close(scaled_edges(sigmas, 1.0), even_edges(1000))


@pytest.mark.parametrize("own", [1.0, 3.0])
@pytest.mark.parametrize("shift", [0.5, 2.0, 6.0])
def test_sigmas_are_shifted_by_the_formula(own: float, shift: float) -> None:
    """Of a uniform t, the sigma's median and quartiles are the shifted ones: with a number that of
    t, with a scale that of the schedule's own sigma."""
    sigmas = linear_shift(linear_sigmas(), own)
    for edges, whole in (
        (shifted_edges(sigmas, shift), shift),
        (scaled_edges(sigmas, shift), own * shift),
    ):
        drawn = [draw_index(0, "a", v, (0, 1000), Density(), edges) for v in range(DRAWS)]
        found = sigmas[torch.tensor(drawn)].float()
        t = torch.tensor([0.25, 0.5, 0.75])
        expected = whole * t / (1 + (whole - 1) * t)
        torch.testing.assert_close(found.quantile(t), expected, atol=0.03, rtol=0)


@given(
    st.integers(0, 2**40),
    st.text(min_size=1),
    st.integers(0, 10**6),
    st.integers(0, 998).flatmap(lambda low: st.tuples(st.just(low), st.integers(low + 1, 1000))),
    st.sampled_from([density for density, _ in DENSITIES]),
    st.floats(0.05, 50),
)
def test_a_draw_depends_on_nothing_but_its_arguments(
    seed: int, sample: str, visit: int, share: tuple[int, int], density: Density, scale: float
) -> None:
    edges = scaled_edges(linear_shift(linear_sigmas(), 3.0), scale)
    first = draw_index(seed, sample, visit, share, density, edges)
    torch.manual_seed(seed % 1000)
    assert share[0] <= first < share[1]
    assert draw_index(seed, sample, visit, share, density, edges) == first


def test_the_default_draws_what_it_always_drew() -> None:
    family = find_family("qwen_image")
    config = TrainingConfig(seed=5, lora_base_model=("dit",))
    timesteps = resolve(config, family).schedule
    (share,) = timesteps.shares
    assert share == Share("dit", 0, 1000)
    for visit in range(20):
        assert timesteps.index(share, "a", visit, 99) == timestep_index(5, "a", visit, 0, 1000)


def two_experts() -> Family:
    family = find_family("wanvideo")
    return replace(family, denoisers=(Denoiser("dit", low=875.0), Denoiser("dit2", high=875.0)))


def test_steps_go_to_experts_as_often_as_their_timesteps_are_drawn() -> None:
    family = two_experts()
    both = {"lora_base_model": ("dit", "dit2")}
    config = TrainingConfig(timestep_sampling="logit_normal", logit_mean=-1.0, **both)
    shares = resolve(config, family).schedule.shares
    assert [(s.low, s.high) for s in shares] == [(0, 417), (417, 1000)]
    t = np.linspace(0.583, 1, 20_001)[:-1]
    part = float(logit_normal(t + 1e-7, -1.0, 1.0).mean() * 0.417)
    steps = [share_of_step(shares, 0, step).component for step in range(3000)]
    assert steps.count("dit") / 3000 == pytest.approx(part, abs=3 * math.sqrt(part / 3000))
    # The shift of the schedule itself as a number leaves the shares nearly as they are.
    moved = resolve(TrainingConfig(timestep_shift=5.0, **both), family).schedule.shares
    assert moved[0].weight == pytest.approx(0.417, abs=2e-3)


def test_a_size_of_its_own_shifts_a_sample() -> None:
    family = find_family("wanvideo")
    config = TrainingConfig(timestep_shift="resolution", lora_base_model=("dit",))
    model = resolve(config, family)
    timesteps = model.schedule
    (share,) = timesteps.shares

    def median(pixels: int) -> float:
        drawn = [timesteps.index(share, "a", visit, pixels) for visit in range(1000)]
        return float(model.noising.timesteps[torch.tensor(drawn)].median())

    usual = 832 * 480
    for scale in (0.5, 1.0, 2.0):
        a = 5.0 * scale
        expected = 1000 * a * 0.5 / (1 + (a - 1) * 0.5)
        assert median(int(usual * scale**2)) == pytest.approx(expected, abs=30)


BASE = {
    "dataset_base_path": "d",
    "dataset_metadata_path": "m.csv",
    "model_paths": ["a.safetensors"],
    "lora_base_model": "dit",
    "family": "qwen_image",
}


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"logit_mean": 1.0}, "'logit_mean' is of 'timestep_sampling' = logit_normal"),
        ({"timestep_sampling": "mode", "logit_std": 2.0}, "= logit_normal, which is mode"),
        ({"timestep_sampling": "logit_normal", "mode_scale": 1.0}, "= mode, which is logit_normal"),
        ({"timestep_sampling": "normal"}, "input should be 'uniform'"),
        ({"timestep_sampling": "mode", "mode_scale": 1.8}, "less than or equal to 1.75"),
        ({"timestep_shift": "size"}, "'timestep_shift' = 'size'"),
        ({"timestep_shift": 0}, "greater than 0"),
        (
            {"timestep_shift": 2.0, "task": "direct_distill"},
            "'timestep_shift' has no effect on direct distillation",
        ),
    ],
)
def test_what_makes_no_sense_is_refused(given: dict[str, Any], words: str) -> None:
    with pytest.raises(ParameterError, match=words):
        make_config({**BASE, **given})


def test_what_a_family_cannot_is_refused() -> None:
    unet = {**BASE, "family": "stable_diffusion", "lora_base_model": "unet", "timestep_shift": 2.0}
    with pytest.raises(ParameterError, match="no sigmas that are shifted"):
        resolve(make_config(unet), find_family("stable_diffusion"))
    config = TrainingConfig(timestep_shift="resolution", lora_base_model=("dit", "dit2"))
    with pytest.raises(ParameterError, match="cannot depend on the size of a sample"):
        resolve(config, two_experts())
    far = TrainingConfig(
        timestep_sampling="logit_normal",
        logit_mean=-20.0,
        logit_std=0.1,
        lora_base_model=("dit",),
        max_timestep_boundary=0.1,
    )
    family = find_family("qwen_image")
    with pytest.raises(ParameterError, match="of 'dit' are never drawn"):
        resolve(far, family)


def test_the_plan_says_how_timesteps_are_drawn() -> None:
    plan = make_plan(make_config({**BASE, "timestep_sampling": "mode", "timestep_shift": "3"}))
    assert plan["objective"].endswith("; drawn by mode; drawn with the shift 3.0")


def test_trainings_differ_by_how_timesteps_are_drawn(values: Values, tmp_path: Path) -> None:
    given: list[dict[str, Any]] = [
        {},
        {"timestep_sampling": "logit_normal"},
        {"timestep_shift": 3.0},
        {"timestep_shift": "resolution"},
    ]
    ends: set[bytes] = set()
    for number, more in enumerate(given):
        run = train_to_end(values(**more), tmp_path / str(number))
        ends.add((run / "epoch-0.safetensors").read_bytes())
    assert len(ends) == len(given)
