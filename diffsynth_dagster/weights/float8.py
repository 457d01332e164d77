"""Store weights in float8, and convert them to the compute type layer by layer."""

import re

import torch
from diffusers.hooks import apply_layerwise_casting
from torch import nn

# Patterns of module names. Norms and embeddings lose too much precision in float8; adapters are
# trained, so they keep the type of the training.
_NOT_IN_FLOAT8 = (
    *("pos_embed", "patch_embed", "norm", "embed_tokens", "shared"),
    *("lora_", "lokr_", "oft_"),
)


def store_in_float8(module: nn.Module, compute: torch.dtype, device: torch.device) -> None:
    """Store the weights of a module in float8 (e4m3) on a device, and compute in another type.

    Each layer is converted for its own forward pass; the device never holds the whole module in the
    compute type. Norms, embeddings of positions and patches, LoRA layers, and modules that the
    architecture keeps in float32 are not converted. Add LoRA layers before this call.
    """
    kept = [*_NOT_IN_FLOAT8, *(getattr(module, "_skip_layerwise_casting_patterns", None) or ())]
    for name in getattr(module, "_keep_in_fp32_modules", None) or ():
        kept.append(rf"(^|\.){re.escape(name)}(\.|$)")
    # Convert before moving: the device needs memory for float8 only.
    apply_layerwise_casting(
        module,
        storage_dtype=torch.float8_e4m3fn,
        compute_dtype=compute,
        skip_modules_pattern=tuple(kept),
        non_blocking=device.type == "cuda",
    )
    module.to(device)
