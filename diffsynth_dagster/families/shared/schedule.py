"""The sigmas of published flow-matching samplers, and Euler's method along them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.flux.pipeline_flux import calculate_shift

from diffsynth_dagster.families.contract import SampleRequest, Tensors
from diffsynth_dagster.families.shared.packing import grid_of
from diffsynth_dagster.objective.flow import NUM_TRAIN_TIMESTEPS


def dynamic_sigmas(settings: Mapping[str, object], steps: int, x_0: Tensors) -> torch.Tensor:
    """The sigmas of a published sampler whose shift grows with the size of the image.

    Args:
        settings: the published settings of diffusers' flow-matching Euler scheduler.
        x_0: latents `image` (B, C, H, W), of which only the size matters.

    Returns:
        float32 (steps + 1,), from 1 to 0.
    """
    rows, columns = grid_of(x_0["image"])
    return sigmas_at(settings, steps, rows * columns)


def sigmas_at(settings: Mapping[str, object], steps: int, tokens: int) -> torch.Tensor:
    """The sigmas of a published sampler whose shift grows with the number of tokens.

    Returns:
        float32 (steps + 1,), from 1 to 0.
    """
    scheduler: Any = FlowMatchEulerDiscreteScheduler.from_config(dict(settings))
    published = scheduler.config
    mu = calculate_shift(
        tokens,
        published.base_image_seq_len,
        published.max_image_seq_len,
        published.base_shift,
        published.max_shift,
    )
    # As diffusers' pipelines call it. The scheduler appends the last sigma, 0.
    scheduler.set_timesteps(sigmas=torch.linspace(1.0, 1 / steps, steps).tolist(), mu=mu)
    # diffusers divides by zero when it stretches a single sigma to the terminal one.
    return scheduler.sigmas if steps > 1 else torch.tensor([1.0, 0.0])


@dataclass(frozen=True)
class EulerSteps:
    """Euler's method for a model that predicts the velocity dx / d sigma.

    Attributes:
        sigmas: (steps + 1,), decreasing from 1 to 0.
    """

    sigmas: torch.Tensor

    @property
    def timesteps(self) -> torch.Tensor:
        """See `Solver`."""
        return self.sigmas[:-1] * NUM_TRAIN_TIMESTEPS

    def start(self, noise: Tensors) -> Tensors:
        """See `Solver`."""
        return noise

    def seen(self, x: Tensors, index: int) -> Tensors:
        """See `Solver`."""
        return x

    def step(self, prediction: Tensors, x: Tensors, index: int) -> Tensors:
        """See `Solver`."""
        width = self.sigmas[index + 1] - self.sigmas[index]
        return {n: latents + width * prediction[n] for n, latents in x.items()}


def euler(
    sigmas: Callable[[int, Tensors], torch.Tensor],
) -> Callable[[SampleRequest, Tensors], EulerSteps]:
    """A `Sampling.solver` that takes Euler steps along `sigmas`: see `Family.inference_sigmas`."""
    return lambda request, noise: EulerSteps(sigmas(request.num_inference_steps, noise))
