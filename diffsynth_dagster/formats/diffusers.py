"""LoRAs in the format of diffusers: `<folder>.<layer>.lora_A.weight`, with alpha = rank."""

import json
from typing import Any

import torch
from torch import nn

from diffsynth_dagster.families.lora import Lora
from diffsynth_dagster.families.sampling_types import Tensors
from diffsynth_dagster.formats.contract import AllRules, Loras, NamedTensors, UnreadableLora
from diffsynth_dagster.formats.reading import read_all, read_as

ADAPTER_KEY = "lora_adapter_metadata"
"""Entry of a file's header with the settings of peft."""
REFUSALS = (ValueError, KeyError, RuntimeError, TypeError, AssertionError, AttributeError)
"""The exceptions by which diffusers and peft refuse a file."""


class Diffusers:
    """See `Format`."""

    def write(self, loras: Loras, rules: AllRules) -> NamedTensors:
        tensors: Tensors = {}
        settings: dict[str, object] = {}
        for name, lora in loras.items():
            # s is folded into B, since pipelines that ignore the header take alpha = rank.
            folder, folded = rules[name].folder, lora.folded()
            for layer, a in folded.down.items():
                tensors[f"{folder}.{layer}.lora_A.weight"] = a
                tensors[f"{folder}.{layer}.lora_B.weight"] = folded.up[layer]
            settings |= {f"{folder}.{key}": value for key, value in peft_settings(folded).items()}
        return NamedTensors(tensors, {ADAPTER_KEY: json.dumps(settings, sort_keys=True)})

    def read(self, tensors: Tensors, rules: AllRules) -> dict[str, Lora]:
        return read_as("diffusers", tensors, rules)

    def try_load(
        self, spelled: NamedTensors, name: str, module: nn.Module, rules: AllRules
    ) -> Lora:
        settings = json.loads(spelled.notes.get(ADAPTER_KEY, "{}"))
        wanted = read_all(spelled.tensors, rules)[name].lora.down
        try:
            rules[name].load(without_weights(module), dict(spelled.tensors), settings)
        except REFUSALS as error:
            raise UnreadableLora(str(error)) from error
        # The loaders skip layers that they do not find, some without an error.
        taken = applied(module)
        left_out = [layer for layer in wanted if layer not in taken.down]
        if left_out:
            raise UnreadableLora(
                f"it leaves {len(left_out)} of {len(wanted)} layers out, such as {left_out[0]}"
            )
        return taken


def dora_settings(folder: str, tensors: Tensors, rank: int, alpha: float) -> dict[str, object]:
    """The settings of a DoRA for the header of a file for diffusers' pipelines.

    Args:
        tensors: named `<layer>.lora_A.weight`, `.lora_B.weight`, `.lora_magnitude_vector`.
    """
    return {
        f"{folder}.r": rank,
        f"{folder}.lora_alpha": alpha,
        f"{folder}.target_modules": sorted({name.rsplit(".lora_", 1)[0] for name in tensors}),
        f"{folder}.use_dora": True,
    }


def peft_settings(lora: Lora) -> dict[str, Any]:
    """The settings of peft's LoraConfig for a LoRA whose scale is 1 in every layer."""
    ranks = {layer: len(a) for layer, a in lora.down.items()}
    rank = max(ranks.values(), default=0)
    # A scale of 1 means alpha = rank, so layers of another rank need another alpha, too.
    others = {layer: layer_rank for layer, layer_rank in ranks.items() if layer_rank != rank}
    patterns = {"rank_pattern": others, "alpha_pattern": others} if others else {}
    return {"r": rank, "lora_alpha": rank, "target_modules": sorted(ranks), **patterns}


def without_weights(module: nn.Module) -> nn.Module:
    """Replace weights on the meta device by zeros that take almost no memory; returns the module.

    peft puts a LoRA on the device of its layer. On the meta device the LoRA would have no values.
    """
    for layer in module.modules():
        for name, weight in [*layer.named_parameters(recurse=False)]:
            if weight.is_meta:
                # `expand` gives all elements of the shape the same place in memory.
                zeros = torch.zeros((), dtype=weight.dtype).expand(weight.shape)
                setattr(layer, name, nn.Parameter(zeros, requires_grad=False))
        for name, buffer in [*layer.named_buffers(recurse=False)]:
            if buffer.is_meta:
                setattr(layer, name, torch.zeros((), dtype=buffer.dtype).expand(buffer.shape))
    return module


def applied(module: nn.Module) -> Lora:
    """Read the LoRA that peft has put into the layers of a module."""
    down: Tensors = {}
    up: Tensors = {}
    scale: dict[str, float] = {}
    layers: list[tuple[str, Any]] = [
        (n, m) for n, m in module.named_modules() if hasattr(m, "lora_A")
    ]
    for name, layer in layers:
        for adapter, a in layer.lora_A.items():
            down[name] = a.weight.detach()
            up[name] = layer.lora_B[adapter].weight.detach()
            scale[name] = float(layer.scaling[adapter])
    return Lora(down, up, scale)


FORMAT = Diffusers()
