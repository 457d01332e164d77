"""The noising path of the Stable Diffusion models, and their sampler."""

from collections.abc import Mapping
from typing import Any, cast, get_args

import torch
from diffusers import EulerDiscreteScheduler

from diffsynth_dagster.config.parameters import TrainingConfig
from diffsynth_dagster.errors import ParameterError
from diffsynth_dagster.families.contract import Settings
from diffsynth_dagster.objective.ddpm import (
    BetaSchedule,
    DDPMPath,
    Prediction,
    ddpm_path,
)
from diffsynth_dagster.objective.path import NoisingPath

PARAMETERS = ("prediction_type", "zero_terminal_snr", "min_snr_gamma")
SCHEDULER_MARKS: Mapping[str, Settings] = {
    "v_pred": {"prediction_type": "v_prediction"},
    "ztsnr": {"rescale_betas_zero_snr": True},
}
"""Empty tensors by which whole checkpoints say what they are."""
SCHEDULE, FIRST, LAST = "scaled_linear", 0.00085, 0.012
"""The betas of every published model, used where there is no scheduler's file."""


def path(config: TrainingConfig, published: Settings) -> DDPMPath:
    """The path that the model was trained on.

    Args:
        published: settings of a scheduler of diffusers. The parameters go before them.

    Raises:
        ParameterError: the settings are of another schedule, or the terminal SNR is zero and the
            model predicts the noise.
    """
    settings: dict[str, Any] = {
        "beta_schedule": SCHEDULE,
        "beta_start": FIRST,
        "beta_end": LAST,
        **published,
    }
    prediction = config.prediction_type or settings.get("prediction_type") or "epsilon"
    schedule, steps = settings["beta_schedule"], settings.get("num_train_timesteps", 1000)
    known = schedule in get_args(BetaSchedule) and prediction in get_args(Prediction)
    if not known or steps != 1000 or settings.get("trained_betas"):
        raise ParameterError(
            f"the scheduler's settings are not supported: {schedule} over {steps} timesteps, "
            f"predicts {prediction}",
            where="scheduler/scheduler_config.json",
            do="give the scheduler that is published with the model",
        )
    zero = config.zero_terminal_snr or bool(settings.get("rescale_betas_zero_snr"))
    if zero and prediction == "epsilon":
        raise ParameterError(
            "the last timestep is nothing but noise (zero terminal SNR), and the model predicts "
            "the noise: nothing can be learned there",
            where="zero_terminal_snr" if config.zero_terminal_snr else "prediction_type",
            do="give prediction_type: v_prediction for a model that predicts v, or leave "
            "zero_terminal_snr out",
        )
    return ddpm_path(
        cast(BetaSchedule, schedule),
        settings["beta_start"],
        settings["beta_end"],
        cast(Prediction, prediction),
        zero,
        config.min_snr_gamma,
    )


def sampler(noising: NoisingPath) -> EulerDiscreteScheduler:
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
