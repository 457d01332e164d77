"""Adds LoRA layers, or those of another adapter method, to the module of a component."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from peft.tuners.lora import LoraLayer
from torch import nn

from diffsynth_dagster.config.parameters import TrainingConfig
from diffsynth_dagster.families.contract import Family
from diffsynth_dagster.training.adapters import add_adapter, is_adapter, saved_name
from diffsynth_dagster.training.lora_targets import lora_targets
from diffsynth_dagster.weights.adapter_files import (
    AdapterFile,
    read_adapter,
    require_values,
    start_adapter,
)
from diffsynth_dagster.weights.lora import LoraFile, read_lora, require_start, start_lora


def add_lora(config: TrainingConfig, family: Family, module: nn.Module, base: str) -> list[str]:
    """Add LoRA layers, or those of another method, in float32, to a component or a part of it;
    returns the names of the layers that got one.

    The initial values depend only on the seed, or are those of `lora_checkpoint`.

    Raises:
        TargetError: see `lora_targets`.
        WeightsError: see `read_start`.
    """
    targets = lora_targets(config, family, module, base)
    start = read_start(config, family, module, base, targets)
    add_adapter(config, module, targets)
    if isinstance(start, LoraFile):
        # Files may have another alpha: their scale is folded into the weights.
        start_lora(module, start, config.alpha / config.lora_rank)
    elif start is not None:
        trained = {saved_name(n): p for n, p in module.named_parameters() if is_adapter(n)}
        shapes = {name: tuple(parameter.shape) for name, parameter in trained.items()}
        require_values(start, config.adapter, shapes, start_of(config))
        start_adapter(trained, start, config.adapter)
    return targets


def read_start(
    config: TrainingConfig, family: Family, module: nn.Module, base: str, targets: Sequence[str]
) -> LoraFile | AdapterFile | None:
    """The adapter in `lora_checkpoint`; None if it is not given.

    Raises:
        WeightsError: it is not a LoRA of these targets and of `lora_rank`. For other methods: it
            cannot be read; `require_values` checks whether it fits.
    """
    if config.lora_checkpoint is None:
        return None
    path = Path(config.lora_checkpoint)
    if config.lora_method != "lora":
        return read_adapter(path, family, base, "lora_checkpoint")
    lora = read_lora(path, family, base, "lora_checkpoint")
    if family.parts:
        # The file holds the LoRAs of all parts of a component as one: keep this part's layers.
        layers = [layer for layer in lora.down if family.part(base).holds(layer)]
        part = lora.part({layer: layer for layer in layers})
        lora = replace(lora, down=part.down, up=part.up, scale=part.scale)
    require_start(module, lora, targets, config.lora_rank, start_of(config))
    return lora


def start_of(config: TrainingConfig) -> str:
    """`lora_checkpoint` and its value, for messages."""
    return f"lora_checkpoint = {config.lora_checkpoint}"


def weight_norms(components: Iterable[tuple[str, nn.Module]]) -> dict[str, dict[str, float]]:
    """Component → layer with a LoRA → the Frobenius norm of the layer's base weights, to six
    digits."""
    norms: dict[str, dict[str, float]] = {}
    for name, component in components:
        for layer, module in component.named_modules():
            if isinstance(module, LoraLayer):
                weight: Any = module.get_base_layer().weight
                norm = float(weight.detach().float().norm())
                norms.setdefault(name, {})[layer] = float(f"{norm:.6g}")
    return norms
