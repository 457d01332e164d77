"""FLUX.1's LoRAs: on the transformer and on CLIP's text encoder."""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from diffusers import FluxPipeline
from torch import nn

from diffsynth_dagster.families.flux.names import GUIDE, LORA_ALIASES, NAMES
from diffsynth_dagster.families.lora import LoraRules
from diffsynth_dagster.families.sampling_types import Tensors
from diffsynth_dagster.families.shared import clip


def load_lora(
    folder: str, module: nn.Module, tensors: Tensors, metadata: Mapping[str, object]
) -> None:
    """Load a LoRA the way `FluxPipeline.load_lora_weights` does.

    Args:
        folder: the component's folder in the diffusers layout.

    Raises:
        ValueError: the pipeline would ignore some layers.
    """
    state, alphas = FluxPipeline.lora_state_dict(dict(tensors), return_alphas=True)
    # The pipeline skips other prefixes without a word. A LoRA must not lose layers that way.
    left_out = [n for n in state if not n.startswith(("transformer.", "text_encoder."))]
    if left_out:
        raise ValueError(f"FluxPipeline leaves {', '.join(left_out[:3])} out")
    more: dict[str, Any] = {"metadata": dict(metadata) or None, "low_cpu_mem_usage": True}
    if folder == "transformer":
        FluxPipeline.load_lora_into_transformer(state, alphas, module, **more)
    else:
        FluxPipeline.load_lora_into_text_encoder(state, alphas, module, folder, **more)


TRANSFORMER = LoraRules(
    "transformer",
    partial(load_lora, "transformer"),
    targets=tuple(LORA_ALIASES),
    aliases=LORA_ALIASES,
    authors=NAMES,
    guide=GUIDE,
    native="diffusers",
    read_by_comfyui=("comfyui", "kohya", "diffusers"),
    read_by_guide=("guide", "diffusers", "kohya"),
)
TEXT_ENCODER = replace(
    clip.lora("text_encoder", partial(load_lora, "text_encoder"), ("lora_te1_", "lora_te_")),
    native="diffusers",
)
