"""The sigmas of published samplers."""

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.flux.pipeline_flux import calculate_shift

from diffsynth_dagster.families.contract import Tensors
from diffsynth_dagster.families.shared.packing import grid_of


def dynamic_sigmas(settings: Mapping[str, object], steps: int, x_0: Tensors) -> torch.Tensor:
    """The sigmas of a published sampler whose shift grows with the size of the image.

    Args:
        settings: of diffusers' flow-matching Euler scheduler, as published.
        x_0: the clean latents, `image` (B, C, H, W).

    Returns:
        float32 (steps + 1,), from 1 to 0.
    """
    scheduler: Any = FlowMatchEulerDiscreteScheduler.from_config(dict(settings))
    published = scheduler.config
    rows, columns = grid_of(x_0["image"])
    mu = calculate_shift(
        rows * columns,
        published.base_image_seq_len,
        published.max_image_seq_len,
        published.base_shift,
        published.max_shift,
    )
    scheduler.set_timesteps(sigmas=torch.linspace(1.0, 1 / steps, steps).tolist(), mu=mu)
    # A single step has nothing to stretch to the terminal sigma: diffusers divides by zero.
    return scheduler.sigmas if steps > 1 else torch.tensor([1.0, 0.0])
