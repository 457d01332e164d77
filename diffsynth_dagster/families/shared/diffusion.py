"""The noising path of the Stable Diffusion models, and their sampler."""

from collections.abc import Mapping
from inspect import signature
from typing import Any, Literal, cast

import diffusers
import torch
from diffusers import EulerDiscreteScheduler
from pydantic import BaseModel, Field, ValidationError, field_validator

from diffsynth_dagster.config.parameters import TrainingConfig
from diffsynth_dagster.errors import ParameterError, WeightsError, shown
from diffsynth_dagster.families.contract import SampleRequest, Settings, Tensors
from diffsynth_dagster.objective.ddpm import (
    BetaSchedule,
    DDPMPath,
    Prediction,
    ddpm_path,
)
from diffsynth_dagster.objective.noising import Noising

PARAMETERS = ("prediction_type", "zero_terminal_snr", "min_snr_gamma")
SCHEDULER_MARKS: Mapping[str, Settings] = {
    "v_pred": {"prediction_type": "v_prediction"},
    "ztsnr": {"rescale_betas_zero_snr": True},
    "edm_vpred.sigma_max": {"_class_name": "EDMEulerScheduler"},
    "edm_mean": {"_class_name": "EDMDPMSolverMultistepScheduler"},
}
"""Marker tensors in whole checkpoints → scheduler settings. The last two are in CosXL and
Playground 2.5. Their noise is not supported: `noising` refuses these schedulers."""


class _Published(BaseModel):
    """The settings of a diffusers scheduler that describe the noise.

    The defaults are those of the published models. The types accept only what we can train:
    another value raises `ValidationError`.
    """

    scheduler: str = Field("DDPMScheduler", alias="_class_name")
    beta_schedule: BetaSchedule = "scaled_linear"
    beta_start: float = Field(0.00085, gt=0.0, lt=1.0)
    beta_end: float = Field(0.012, gt=0.0, lt=1.0)
    prediction_type: Prediction = "epsilon"
    rescale_betas_zero_snr: bool = False
    # These must have their defaults: other values mean another kind of noise.
    num_train_timesteps: Literal[1000] = 1000
    trained_betas: None = None
    use_flow_sigmas: Literal[False] = False

    @field_validator("scheduler")
    @classmethod
    def _has_betas(cls, name: str) -> str:
        """Check that the scheduler class has a schedule of betas."""
        kind = getattr(diffusers, name, None)
        # Flow-matching and EDM schedulers have no such parameter.
        if not isinstance(kind, type) or "beta_schedule" not in signature(kind).parameters:
            raise ValueError("its noise is not that of a schedule of betas")
        return name


def noising(config: TrainingConfig, published: Settings) -> DDPMPath:
    """The noising path that the model was trained on.

    Args:
        published: settings of a diffusers scheduler. The config's parameters override them.

    Raises:
        WeightsError: the settings describe another kind of noise.
        ParameterError: the terminal SNR is zero and the model predicts the noise.
    """
    try:
        # Schedulers write None for settings that are not in use.
        given = {name: value for name, value in published.items() if value is not None}
        settings = _Published.model_validate(given)
    except ValidationError as error:
        detail = error.errors()[0]
        raise WeightsError(
            f"the model's scheduler is not supported: {detail['loc'][0]} = {shown(detail['input'])}: "
            f"{detail['msg']}",
            where="scheduler/scheduler_config.json, or the tensors of a whole checkpoint",
            do="give a model of this family, with the scheduler that is published with it",
        ) from None
    prediction = config.prediction_type or settings.prediction_type
    zero = config.zero_terminal_snr or settings.rescale_betas_zero_snr
    # With an SNR of zero, x_t is the noise itself: predicting it is trivial and says nothing of x_0.
    if zero and prediction == "epsilon":
        raise ParameterError(
            "the last timestep is nothing but noise (zero terminal SNR), and the model predicts "
            "the noise: nothing can be learned there",
            where="zero_terminal_snr" if config.zero_terminal_snr else "prediction_type",
            do="give prediction_type: v_prediction for a model that predicts v, or leave "
            "zero_terminal_snr out",
        )
    return ddpm_path(
        settings.beta_schedule,
        settings.beta_start,
        settings.beta_end,
        prediction,
        zero,
        config.min_snr_gamma,
    )


class EulerDDPM:
    """Euler's method with diffusers' `EulerDiscreteScheduler`.

    x is x_t scaled to the variance 1 + sigma^2 (Karras et al. 2022, arXiv:2206.00364).
    """

    def __init__(self, scheduler: Any, steps: int) -> None:
        scheduler.set_timesteps(steps)
        self._scheduler = scheduler

    @property
    def timesteps(self) -> torch.Tensor:
        """See `Solver`."""
        return self._scheduler.timesteps

    def start(self, noise: Tensors) -> Tensors:
        """See `Solver`."""
        scale = self._scheduler.init_noise_sigma
        return {name: tensor * scale for name, tensor in noise.items()}

    def seen(self, x: Tensors, index: int) -> Tensors:
        """See `Solver`."""
        # What `scale_model_input` does, without the scheduler's own step counter.
        scale = (1 + self._scheduler.sigmas[index] ** 2) ** 0.5
        return {name: state / scale for name, state in x.items()}

    def step(self, prediction: Tensors, x: Tensors, index: int) -> Tensors:
        """See `Solver`."""
        (name,) = x
        t = self.timesteps[index]
        self._scheduler.is_scale_input_called = True  # avoids a warning: `seen` scaled x
        return {name: self._scheduler.step(prediction[name], t, x[name], return_dict=False)[0]}


def solver(request: SampleRequest, noise: Tensors) -> EulerDDPM:
    """The published sampler for the noising path of a request: see `Sampling.solver`."""
    return EulerDDPM(sampler(request.noising), request.num_inference_steps)


def sampler(noising: Noising) -> EulerDiscreteScheduler:
    """The sampler published with Stable Diffusion XL, for the path that `noising` returned."""
    path = cast(DDPMPath, noising)
    # The path starts with the most noise, diffusers with the least. beta_t follows from
    # alpha_bar_t = alpha_bar_{t-1} (1 - beta_t), with alpha_bar = 1 before the first step.
    alpha_bar = path.signal.flip(0).double() ** 2
    previous = torch.cat([torch.ones(1, dtype=torch.float64), alpha_bar[:-1]])
    return EulerDiscreteScheduler(
        trained_betas=(1.0 - alpha_bar / previous).tolist(),
        prediction_type=path.prediction,
        # "leading" skips the last timestep, the one that zero terminal SNR changes.
        timestep_spacing="trailing" if path.zero_terminal_snr else "leading",
        rescale_betas_zero_snr=path.zero_terminal_snr,
        steps_offset=1,
    )
