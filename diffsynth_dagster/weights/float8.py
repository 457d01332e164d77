"""Weights that are stored in float8 and computed with in another type."""

import re

import torch
from diffusers.hooks import apply_layerwise_casting
from torch import nn

_NOT_IN_FLOAT8 = (
    *("pos_embed", "patch_embed", "norm", "embed_tokens", "shared"),
    *("lora_", "lokr_", "oft_"),
)


def store_in_float8(module: nn.Module, compute: torch.dtype, device: torch.device) -> None:
    """Keep the weights of a module in float8 (e4m3) on a device, and compute there in another type.

    The device never holds the whole module in the other type. Norms, embeddings of positions and
    patches, LoRA layers, and what the architecture keeps in float32 stay as they are; LoRA layers
    must be there already.
    """
    kept = [*_NOT_IN_FLOAT8, *(getattr(module, "_skip_layerwise_casting_patterns", None) or ())]
    for name in getattr(module, "_keep_in_fp32_modules", None) or ():
        kept.append(rf"(^|\.){re.escape(name)}(\.|$)")
    apply_layerwise_casting(
        module,
        storage_dtype=torch.float8_e4m3fn,
        compute_dtype=compute,
        skip_modules_pattern=tuple(kept),
        non_blocking=device.type == "cuda",
    )
    module.to(device)
