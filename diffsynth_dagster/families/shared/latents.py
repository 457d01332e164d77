"""Pictures and videos → latents: the mode of the VAE's posterior, brought to the model's scale."""

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import AutoencoderKL, AutoencoderKLQwenImage, AutoencoderKLWan

from diffsynth_dagster.families.contract import Sample


def stacked(samples: Sequence[Sample], column: str) -> torch.Tensor:
    """The tensors of a column, of equal shape, as one batch (B, …)."""
    return torch.stack([sample[column] for sample in samples])


def encode_scaled(vae: AutoencoderKL, pixels: torch.Tensor) -> torch.Tensor:
    """Images (B, 3, H, W) in [-1, 1] → latents (B, C, H/8, W/8) float32, moved and scaled by one
    shift and one factor for all channels."""
    config: Any = vae.config
    return (_mode(vae, pixels) - config.shift_factor) * config.scaling_factor


def encode_standardised(
    vae: AutoencoderKLWan | AutoencoderKLQwenImage, pixels: torch.Tensor
) -> torch.Tensor:
    """Videos (B, 3, F, H, W) in [-1, 1] → latents (B, C, F', H', W') float32, F' = 1 + (F - 1) / 4,
    less the mean and divided by the deviation of each channel."""
    config: Any = vae.config
    latents = _mode(vae, pixels)
    mean = torch.tensor(config.latents_mean, device=latents.device).view(1, -1, 1, 1, 1)
    std = torch.tensor(config.latents_std, device=latents.device).view(1, -1, 1, 1, 1)
    return (latents - mean) / std


def _mode(vae: Any, pixels: torch.Tensor) -> torch.Tensor:
    """The mode of the posterior, float32."""
    return vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist.mode().float()
