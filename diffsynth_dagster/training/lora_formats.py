"""Which formats the LoRAs of a training are written in, and whether these can hold them."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from diffsynth_dagster.config.parameters import TrainingConfig
from diffsynth_dagster.errors import TargetError
from diffsynth_dagster.facts import digest_of
from diffsynth_dagster.families.contract import Family, Tensors
from diffsynth_dagster.families.lora import Lora, LoraFormat
from diffsynth_dagster.formats import find_format
from diffsynth_dagster.formats.contract import UnreadableLora
from diffsynth_dagster.formats.diffusers import REFUSALS, dora_settings
from diffsynth_dagster.weights.load import architecture_of, build_empty
from diffsynth_dagster.weights.resolved import ComponentFiles

_LOADABLE: set[str] = set()
"""Digests of what was tried in this process and can be written and loaded."""


def checkpoint_format(config: TrainingConfig, family: Family) -> LoraFormat | None:
    """The format of the LoRAs in checkpoints; None without a LoRA, or for another adapter
    method."""
    if config.lora_method != "lora" or not config.lora_base_model:
        return None
    if config.align_to_opensource_format:
        # The parameter is another name for checkpoint_format = kohya.
        return "kohya"
    if not config.remove_prefix_in_ckpt:
        return "guide"
    return config.checkpoint_format or family.lora_rules(config.lora_base_model[0]).native


def export_formats(config: TrainingConfig, family: Family) -> tuple[LoraFormat, ...]:
    """The formats of the exports of a LoRA."""
    if config.export_formats is not None:
        return tuple(dict.fromkeys(config.export_formats))
    defaults = family.lora_rules(config.lora_base_model[0]).exports
    return (*defaults, "kohya") if config.align_to_opensource_format else defaults


def check_formats(
    config: TrainingConfig,
    family: Family,
    base: str,
    files: ComponentFiles,
    layers: Mapping[str, nn.Module],
) -> None:
    """Write a LoRA of rank 1 on these layers in each format of the training, and let the format's
    tool load it.

    Args:
        base: the component or part that gets the LoRA.
        files: of the component.
        layers: name of each layer that gets the LoRA → its module on the meta device.

    Raises:
        TargetError: a format has no name for one of the layers, or its tool would not take it.
    """
    rules = {base: family.lora_rules(base)}
    lora = _of_rank_1(layers)
    formats: list[LoraFormat] = [*export_formats(config, family)]
    native = checkpoint_format(config, family)
    if native is not None and native not in formats:
        # Checkpoints may be in another format than the exports.
        formats.append(native)
    shapes = {name: tuple(tensor.shape) for name, tensor in lora.up.items()}
    # A model is built for each try, so that each combination is tried once.
    digest = digest_of([architecture_of(files), shapes, formats, config.lora_method])
    if digest in _LOADABLE:
        return
    if config.lora_method == "dora":
        folder, dora = rules[base].folder, _dora_of(layers, lora)
        named = {f"{folder}.{name}": tensor for name, tensor in dora.items()}
        try:
            rules[base].load(build_empty(files), named, dora_settings(folder, dora, 1, 1.0))
        except REFUSALS as error:
            raise _not_loadable("diffusers", str(error)) from error
        _LOADABLE.add(digest)
        return
    for name in formats:
        try:
            spelled = find_format(name).write({base: lora}, rules)
            find_format(name).try_load(spelled, base, build_empty(files), rules)
        except KeyError as error:
            raise _not_loadable(name, f"it has no name for {error.args[0]}") from error
        except UnreadableLora as error:
            raise _not_loadable(name, str(error)) from error
    _LOADABLE.add(digest)


def _not_loadable(name: str, why: str) -> TargetError:
    return TargetError(
        f"a LoRA on these layers could not be loaded in the format {name}: {why}",
        where="lora_base_model, lora_target_modules, checkpoint_format, export_formats",
        do="choose other layers, another format, or another model",
    )


def _of_rank_1(layers: Mapping[str, nn.Module]) -> Lora:
    """A LoRA of ones with rank 1 on these layers."""
    down: Tensors = {}
    up: Tensors = {}
    for name, layer in layers.items():
        weight: Any = layer.weight
        # The window of a convolution belongs to `down`; `up` is 1×1.
        down[name] = torch.ones(1, *weight.shape[1:])
        up[name] = torch.ones(len(weight), 1, *(1,) * (weight.ndim - 2))
    return Lora(down, up, dict.fromkeys(down, 1.0))


def _dora_of(layers: Mapping[str, nn.Module], lora: Lora) -> Tensors:
    """A DoRA on the same layers, under the names of checkpoints."""
    tensors: Tensors = {}
    for name, layer in layers.items():
        weight: Any = layer.weight
        window = weight.shape[2:]
        tensors[f"{name}.lora_A.weight"] = lora.down[name]
        tensors[f"{name}.lora_B.weight"] = lora.up[name]
        # peft keeps the magnitudes of a convolution as (1, out, 1, 1), of a linear layer as (out,).
        size = (1, len(weight), *(1 for _ in window)) if window else (len(weight),)
        tensors[f"{name}.lora_magnitude_vector"] = torch.ones(size)
    return tensors
