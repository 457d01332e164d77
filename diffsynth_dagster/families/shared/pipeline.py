"""Loading LoRAs like diffusers' pipelines, which is how exports are checked."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from diffsynth_dagster.families.contract import Tensors


def load_into_transformer(
    pipeline: Any,
    module: nn.Module,
    tensors: Tensors,
    metadata: Mapping[str, object],
) -> None:
    """Load an exported LoRA the way a diffusers pipeline with one transformer does."""
    pipeline.load_lora_into_transformer(
        pipeline.lora_state_dict(dict(tensors)),
        module,
        metadata=dict(metadata) or None,
        low_cpu_mem_usage=True,
    )
