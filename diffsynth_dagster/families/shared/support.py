"""What more than one family needs to declare itself."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from torch import nn

from diffsynth_dagster.families.contract import Shapes, Tensors

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


def t5_settings(shapes: Shapes) -> dict[str, Any]:
    """What the shapes of an encoder of the T5 kind tell of its architecture."""
    attention = "encoder.block.0.layer.0.SelfAttention."
    vocabulary, hidden = shapes["shared.weight"]
    buckets, heads = shapes[f"{attention}relative_attention_bias.weight"]
    return {
        "vocab_size": vocabulary,
        "d_model": hidden,
        "d_kv": shapes[f"{attention}q.weight"][0] // heads,
        "d_ff": shapes["encoder.block.0.layer.1.DenseReluDense.wi_0.weight"][0],
        "num_layers": count_blocks(shapes, "encoder.block."),
        "num_heads": heads,
        "relative_attention_num_buckets": buckets,
    }


def load_into_transformer(
    pipeline: Any,
    component: str,
    module: nn.Module,
    tensors: Tensors,
    metadata: Mapping[str, Any],
) -> None:
    """Load an exported LoRA the way a pipeline of diffusers with one transformer does.

    Raises:
        ValueError: the pipeline loads none into this component.
    """
    if component != "dit":
        raise ValueError(f"{pipeline.__name__} loads no LoRA into its {component}")
    pipeline.load_lora_into_transformer(
        pipeline.lora_state_dict(dict(tensors)),
        module,
        metadata=dict(metadata),
        low_cpu_mem_usage=True,
    )


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
