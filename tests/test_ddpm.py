"""The DDPM path against diffusers' scheduler and the formulas of its training examples."""

import re
from typing import Any

import pytest
import torch
from conftest import make_config
from diffusers import DDPMScheduler, EulerDiscreteScheduler
from diffusers.training_utils import compute_snr

from diffsynth_dagster.errors import ParameterError, UserError
from diffsynth_dagster.families.shared.diffusion import noising, sampler
from diffsynth_dagster.objective.ddpm import DDPMPath, ddpm_path

BETAS = {"beta_start": 0.00085, "beta_end": 0.012}
INDEX = torch.tensor([0, 1, 500, 999])
T = 999 - INDEX


def both(
    prediction: Any, zero: bool = False, schedule: Any = "scaled_linear", gamma: float | None = None
) -> tuple[DDPMPath, DDPMScheduler]:
    ours = ddpm_path(schedule, *BETAS.values(), prediction, zero, gamma)
    theirs = DDPMScheduler(
        beta_schedule=schedule, prediction_type=prediction, rescale_betas_zero_snr=zero, **BETAS
    )
    return ours, theirs


@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize("schedule", ["scaled_linear", "linear"])
def test_schedule_is_that_of_the_scheduler(schedule: str, zero: bool) -> None:
    ours, theirs = both("v_prediction", zero, schedule)
    wanted = theirs.alphas_cumprod.flip(0)
    torch.testing.assert_close(ours.signal**2, wanted, atol=2e-6, rtol=2e-5)
    torch.testing.assert_close(ours.noise**2, 1 - wanted, atol=2e-6, rtol=2e-5)
    assert ours.timesteps.tolist() == list(range(999, -1, -1))
    assert (float(ours.signal[0]) == 0.0) == zero


@pytest.mark.parametrize(
    ("prediction", "zero"),
    [("epsilon", False), ("v_prediction", False), ("v_prediction", True), ("sample", True)],
)
def test_noise_and_targets_are_those_of_the_scheduler(prediction: str, zero: bool) -> None:
    ours, theirs = both(prediction, zero)
    source = torch.Generator().manual_seed(0)
    x_0, epsilon = (torch.randn(4, 3, 2, 2, generator=source) for _ in range(2))
    wanted = theirs.add_noise(x_0, epsilon, T)
    torch.testing.assert_close(ours.noised(x_0, epsilon, INDEX), wanted, atol=2e-5, rtol=0)
    velocity = theirs.get_velocity(x_0, epsilon, T)
    target = {"epsilon": epsilon, "v_prediction": velocity, "sample": x_0}[prediction]
    torch.testing.assert_close(ours.target(x_0, epsilon, INDEX), target, atol=2e-5, rtol=0)


@pytest.mark.parametrize(
    ("prediction", "zero"), [("epsilon", False), ("v_prediction", False), ("v_prediction", True)]
)
def test_min_snr_weights_are_those_of_the_training_examples(prediction: str, zero: bool) -> None:
    ours, theirs = both(prediction, zero, gamma=5.0)
    timesteps = torch.arange(999, -1, -1)
    snr = compute_snr(theirs, timesteps)
    bounded = torch.stack([snr, 5.0 * torch.ones_like(timesteps)], dim=1).min(dim=1)[0]
    wanted = bounded / (snr if prediction == "epsilon" else snr + 1)
    torch.testing.assert_close(ours.weights, wanted, atol=1e-6, rtol=1e-4)
    assert float(ours.weights.max()) <= 1.0
    assert torch.equal(both(prediction, zero)[0].weights, torch.ones(1000))


def config(**values: Any) -> Any:
    base = {"dataset_base_path": "d", "dataset_metadata_path": "m.csv", "model_paths": ["x"]}
    return make_config({**base, "lora_base_model": "unet", **values})


def test_path_follows_the_scheduler_and_the_parameters_go_before_it() -> None:
    plain = noising(config(), {})
    assert plain.prediction == "epsilon"
    assert not plain.zero_terminal_snr
    published = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    told = noising(config(), published)
    assert (told.prediction, told.zero_terminal_snr) == ("v_prediction", True)
    asked = noising(config(prediction_type="v_prediction", zero_terminal_snr=True), {})
    assert asked.description == told.description
    assert torch.equal(asked.signal, told.signal)
    for name in ("PNDMScheduler", "EulerDiscreteScheduler", "DDIMScheduler", "LCMScheduler"):
        nothing = {"trained_betas": None, "rescale_betas_zero_snr": None, "prediction_type": None}
        assert noising(config(), {"_class_name": name, **nothing}).description == plain.description
    other = noising(config(prediction_type="epsilon"), {"prediction_type": "v_prediction"})
    assert other.prediction == "epsilon"
    linear = noising(config(), {"beta_schedule": "linear", "beta_end": 0.02})
    assert "beta 0.00085 to 0.02 (linear)" in linear.description


@pytest.mark.parametrize(
    ("values", "published", "words"),
    [
        (
            {"zero_terminal_snr": True, "prediction_type": "epsilon"},
            {},
            "nothing but noise .*where: zero_terminal_snr.*prediction_type: v_prediction",
        ),
        ({}, {"rescale_betas_zero_snr": True}, "nothing but noise .*where: prediction_type"),
        ({}, {"beta_schedule": "squaredcos_cap_v2"}, "not supported: beta_schedule = 'squaredcos"),
        ({}, {"num_train_timesteps": 4000}, "num_train_timesteps = 4000.*scheduler_config.json"),
        ({}, {"prediction_type": "flow_prediction"}, "prediction_type = 'flow_prediction'"),
        ({}, {"trained_betas": [0.1, 0.2]}, "trained_betas"),
        ({}, {"beta_start": "small"}, "beta_start = 'small'"),
        ({}, {"beta_start": -0.1}, "beta_start = -0.1"),
        ({}, {"beta_end": 1.5}, "beta_end = 1.5"),
        *(
            ({}, {"_class_name": name}, f"_class_name = '{name}'.*schedule of betas")
            for name in (
                "EDMDPMSolverMultistepScheduler",  # Playground 2.5
                "EDMEulerScheduler",  # CosXL
                "FlowMatchEulerDiscreteScheduler",
                "NoSuchScheduler",
                "UNet2DConditionModel",
            )
        ),
    ],
)
def test_what_cannot_be_trained_is_refused(
    values: dict[str, Any], published: dict[str, Any], words: str
) -> None:
    with pytest.raises(UserError) as error:
        noising(config(**values), published)
    assert re.search(words, str(error.value), re.DOTALL), str(error.value)


def test_zero_terminal_snr_needs_to_know_what_is_predicted() -> None:
    with pytest.raises(ParameterError, match=r"zero_terminal_snr'? is given but no"):
        config(zero_terminal_snr=True)


def test_sampler_has_the_sigmas_of_the_published_one() -> None:
    for zero in (False, True):
        ours = sampler(both("v_prediction", zero)[0])
        theirs = EulerDiscreteScheduler(
            beta_schedule="scaled_linear",
            prediction_type="v_prediction",
            rescale_betas_zero_snr=zero,
            timestep_spacing="trailing" if zero else "leading",
            steps_offset=1,
            **BETAS,
        )
        for scheduler in (ours, theirs):
            scheduler.set_timesteps(7)
        torch.testing.assert_close(ours.sigmas, theirs.sigmas, atol=1e-4, rtol=1e-3)
        torch.testing.assert_close(ours.timesteps, theirs.timesteps)
