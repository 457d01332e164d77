"""What more than one family needs to declare itself."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from torch import nn

PATCH = 2


def count_blocks(names: Iterable[str], prefix: str) -> int:
    """How many numbered blocks stand under a prefix such as `transformer_blocks.`."""
    depth = prefix.count(".")
    return len({name.split(".")[depth] for name in names if name.startswith(prefix)})


def from_config(kind: Any, config: Mapping[str, Any]) -> nn.Module:
    """A diffusers module from its config.json, without the notes that diffusers left in it."""
    module = kind.from_config({k: v for k, v in config.items() if not k.startswith("_")})
    assert isinstance(module, nn.Module)
    return module


def published_sigmas(scheduler: Any, steps: int, tokens: int) -> torch.Tensor:
    """The sigmas of a published sampler with dynamic shifting, float32 (steps + 1,), 1 to 0.

    Args:
        scheduler: diffusers' flow-matching Euler scheduler with the published settings.
        tokens: length of the image's sequence.
    """
    published = scheduler.config
    mu = calculate_shift(
        tokens,
        published.base_image_seq_len,
        published.max_image_seq_len,
        published.base_shift,
        published.max_shift,
    )
    scheduler.set_timesteps(sigmas=torch.linspace(1.0, 1 / steps, steps).tolist(), mu=mu)
    # A single step has nothing to stretch to the terminal sigma: diffusers divides by zero.
    return scheduler.sigmas if steps > 1 else torch.tensor([1.0, 0.0])


def pack(latents: torch.Tensor) -> torch.Tensor:
    """Latents (B, C, H, W) → tokens of 2x2 patches (B, H W / 4, 4 C)."""
    b, c, h, w = latents.shape
    patches = latents.view(b, c, h // PATCH, PATCH, w // PATCH, PATCH)
    return patches.permute(0, 2, 4, 1, 3, 5).reshape(b, h * w // PATCH**2, c * PATCH**2)


def unpack(tokens: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Tokens (B, H W / 4, 4 C) → latents (B, C, H, W), where H, W are `height`, `width`."""
    b, _, c = tokens.shape
    patches = tokens.view(b, height // PATCH, width // PATCH, c // PATCH**2, PATCH, PATCH)
    return patches.permute(0, 3, 1, 4, 2, 5).reshape(b, c // PATCH**2, height, width)
