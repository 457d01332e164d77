"""Pictures and videos → latents, and back.

Latents are the mode of the VAE's posterior, scaled as the denoiser expects.
"""

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import AutoencoderKL, AutoencoderKLQwenImage, AutoencoderKLWan
from PIL import Image

from diffsynth_dagster.families.contract import Clip, Loaded, Sample, SampleRequest, Tensors


def stacked(samples: Sequence[Sample], column: str) -> torch.Tensor:
    """Stack the tensors of a column, which have equal shapes, to a batch (B, …)."""
    return torch.stack([sample[column] for sample in samples])


def encode_scaled(vae: AutoencoderKL, pixels: torch.Tensor) -> torch.Tensor:
    """Images (B, 3, H, W) in [-1, 1] → latents (B, C, H/8, W/8) float32, shifted and scaled by the
    same two numbers for all channels."""
    config: Any = vae.config
    return (_mode(vae, pixels) - config.shift_factor) * config.scaling_factor


def encode_standardised(
    vae: AutoencoderKLWan | AutoencoderKLQwenImage, pixels: torch.Tensor
) -> torch.Tensor:
    """Videos (B, 3, F, H, W) in [-1, 1] → latents (B, C, F', H', W') float32, F' = 1 + (F - 1) / 4,
    standardised with a mean and standard deviation for each channel."""
    config: Any = vae.config
    latents = _mode(vae, pixels)
    mean = torch.tensor(config.latents_mean, device=latents.device).view(1, -1, 1, 1, 1)
    std = torch.tensor(config.latents_std, device=latents.device).view(1, -1, 1, 1, 1)
    return (latents - mean) / std


def decode_scaled(vae: AutoencoderKL, latents: torch.Tensor) -> torch.Tensor:
    """Latents (B, C, h, w) from `encode_scaled` → images (B, 3, H, W)."""
    config: Any = vae.config
    unscaled = latents / config.scaling_factor + config.shift_factor
    decoder: Any = vae
    return decoder.decode(unscaled.to(vae.dtype), return_dict=False)[0]


def decode_standardised(
    vae: AutoencoderKLWan | AutoencoderKLQwenImage, latents: torch.Tensor
) -> torch.Tensor:
    """Latents (B, C, F', h, w) from `encode_standardised` → videos (B, 3, F, H, W)."""
    config: Any = vae.config
    mean = torch.tensor(config.latents_mean, device=latents.device).view(1, -1, 1, 1, 1)
    std = torch.tensor(config.latents_std, device=latents.device).view(1, -1, 1, 1, 1)
    decoder: Any = vae
    return decoder.decode((latents * std + mean).to(vae.dtype), return_dict=False)[0]


def pictures(pixels: torch.Tensor) -> list[Image.Image]:
    """Images (B, 3, H, W) in [-1, 1] → 8-bit RGB pictures."""
    values = ((pixels.float() / 2 + 0.5).clamp(0.0, 1.0) * 255).round().to(torch.uint8)
    return [Image.fromarray(picture.numpy()) for picture in values.permute(0, 2, 3, 1).cpu()]


def image_shapes(loaded: Loaded, request: SampleRequest) -> dict[str, tuple[int, ...]]:
    """The shape of `image` latents of an image VAE: see `Sampling.shapes`."""
    config: Any = loaded["vae"].config
    # Every level but the last halves the sides.
    factor = 2 ** (len(config.block_out_channels) - 1)
    sides = request.height // factor, request.width // factor
    return {"image": (config.latent_channels, *sides)}


def decode_images(loaded: Loaded, request: SampleRequest, latents: Tensors) -> list[Clip]:
    """Decode images with an image VAE: see `Sampling.decode`."""
    images = pictures(decode_scaled(loaded["vae"], latents["image"]))
    return [Clip([image]) for image in images]


def _mode(vae: Any, pixels: torch.Tensor) -> torch.Tensor:
    """The mode of the VAE's posterior, float32."""
    # The mode, not a sample: cached latents must not depend on random numbers.
    return vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist.mode().float()
