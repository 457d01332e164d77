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
"""Tensors by which whole checkpoints say what they are: CosXL and Playground 2.5 are the last two."""


class _Published(BaseModel):
    """What a scheduler of diffusers says about the noise. Without one: as every published model."""

    scheduler: str = Field("DDPMScheduler", alias="_class_name")
    beta_schedule: BetaSchedule = "scaled_linear"
    beta_start: float = Field(0.00085, gt=0.0, lt=1.0)
    beta_end: float = Field(0.012, gt=0.0, lt=1.0)
    prediction_type: Prediction = "epsilon"
    rescale_betas_zero_snr: bool = False
    num_train_timesteps: Literal[1000] = 1000
    trained_betas: None = None
    use_flow_sigmas: Literal[False] = False

    @field_validator("scheduler")
    @classmethod
    def _has_betas(cls, name: str) -> str:
        kind = getattr(diffusers, name, None)
        if not isinstance(kind, type) or "beta_schedule" not in signature(kind).parameters:
            raise ValueError("its noise is not that of a schedule of betas")
        return name


def noising(config: TrainingConfig, published: Settings) -> DDPMPath:
    """The path that the model was trained on.

    Args:
        published: settings of a scheduler of diffusers. The parameters go before them.

    Raises:
        WeightsError: the settings are of another kind of noise.
        ParameterError: the terminal SNR is zero and the model predicts the noise.
    """
    try:
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
    """Euler's method as `EulerDiscreteScheduler` takes its steps; x has the variance 1 + sigma^2
    (Karras et al. 2022, arXiv:2206.00364)."""

    def __init__(self, scheduler: Any, steps: int) -> None:
        scheduler.set_timesteps(steps)
        self._scheduler = scheduler

    @property
    def timesteps(self) -> torch.Tensor:
        """See `Solver`."""
        return self._scheduler.timesteps

    def start(self, noise: Tensors) -> Tensors:
        """See `Solver`."""
        return {name: each * self._scheduler.init_noise_sigma for name, each in noise.items()}

    def seen(self, x: Tensors, index: int) -> Tensors:
        """See `Solver`."""
        scale = (1 + self._scheduler.sigmas[index] ** 2) ** 0.5
        return {name: each / scale for name, each in x.items()}

    def step(self, prediction: Tensors, x: Tensors, index: int) -> Tensors:
        """See `Solver`."""
        (name,) = x
        t = self.timesteps[index]
        self._scheduler.is_scale_input_called = True  # `seen` scaled it
        return {name: self._scheduler.step(prediction[name], t, x[name], return_dict=False)[0]}


def solver(request: SampleRequest, noise: Tensors) -> EulerDDPM:
    """The published sampler for the path of a request: see `Sampling.solver`."""
    return EulerDDPM(sampler(request.noising), request.num_inference_steps)


def sampler(noising: Noising) -> EulerDiscreteScheduler:
    """The sampler that is published with Stable Diffusion XL, for what `path` returned."""
    path = cast(DDPMPath, noising)
    alpha_bar = path.signal.flip(0).double() ** 2
    before = torch.cat([torch.ones(1, dtype=torch.float64), alpha_bar[:-1]])
    return EulerDiscreteScheduler(
        trained_betas=(1.0 - alpha_bar / before).tolist(),
        prediction_type=path.prediction,
        # A sampler that leaves the last timestep out never sees what zero terminal SNR is for.
        timestep_spacing="trailing" if path.zero_terminal_snr else "leading",
        rescale_betas_zero_snr=path.zero_terminal_snr,
        steps_offset=1,
    )
