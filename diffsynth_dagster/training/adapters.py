"""Adapters of trained layers: LoRA, DoRA, LoKr and OFT, made by peft, in float32, from a seed.

lora: W + s B A (Hu et al. 2021, arXiv:2106.09685), s = alpha / rank.
dora: m (W + s B A) / |W + s B A| for each output (Liu et al. 2024, arXiv:2402.09353).
lokr: W + s w1 ⊗ w2, a Kronecker product; w2 has low rank (Yeh et al. 2023, arXiv:2309.14859).
oft: W R, where R rotates blocks of the inputs (Qiu et al. 2023, arXiv:2306.07280).

All of them start out equal to the base model.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from peft import LoKrConfig, LoraConfig, OFTConfig, PeftConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import nn

from diffsynth_dagster.config.parameters import TrainingConfig
from diffsynth_dagster.errors import TargetError, reason_of

ADAPTER = "default"
# peft calls a parameter "<layer>.lora_A.default.weight".
_KEY = re.compile(rf"\.((?:lora|lokr|oft)_\w+)\.{ADAPTER}(?=\.|$)")
_MAGNITUDE = "lora_magnitude_vector"
_ALWAYS = -1.0
"""peft draws a number in [0, 1) at each step and applies LoKr if it is above the dropout
probability. A probability of 0 would still skip it once in 2^24 draws."""


def is_adapter(name: str) -> bool:
    """Whether a parameter of a module was added by `add_adapter`."""
    return _KEY.search(name) is not None


def saved_name(name: str) -> str:
    """Name of a parameter in saved files: without peft's name of the adapter."""
    saved = _KEY.sub(r".\1", name)
    # DoRA's magnitude is a module with one weight in peft, and a plain tensor in its files.
    return saved.removesuffix(".weight") if saved.endswith(f".{_MAGNITUDE}.weight") else saved


def peft_settings(settings: Mapping[str, Any], targets: Sequence[str]) -> PeftConfig:
    """peft's configuration of an adapter.

    Args:
        settings: `TrainingConfig.adapter`, or the settings that a file states.
        targets: full names of the layers that get it.
    """
    arguments, layers = dict(settings), list(targets)
    method = arguments.pop("method", "lora")
    if method == "oft":
        return OFTConfig(**arguments, target_modules=layers)
    rank, alpha = arguments.pop("rank"), arguments.pop("alpha")
    if method == "lokr":
        return LoKrConfig(r=rank, alpha=alpha, **arguments, target_modules=layers)
    return LoraConfig(
        r=rank, lora_alpha=alpha, use_dora=method == "dora", **arguments, target_modules=layers
    )


def add_adapter(config: TrainingConfig, module: nn.Module, targets: Sequence[str]) -> None:
    """Add the adapter to layers of a module, in float32.

    Its initial values depend only on the seed.

    Args:
        targets: full names of the layers.
    """
    settings = peft_settings(config.adapter, targets)
    if isinstance(settings, LoraConfig):
        settings.lora_dropout = config.lora_dropout
    if isinstance(settings, LoKrConfig):
        settings.module_dropout = _ALWAYS
    # Forked: the global random numbers continue as if nothing had been drawn here.
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        inject_adapter_in_model(settings, module, adapter_name=ADAPTER)
    for name, parameter in module.named_parameters():
        if is_adapter(name):
            # peft uses the type of the layer's weights, in which small updates are rounded away.
            parameter.data = parameter.data.float()
    if config.lora_method == "dora":
        _recompute_magnitudes(module)


def _recompute_magnitudes(module: nn.Module) -> None:
    """Recompute the magnitudes of DoRA's linear layers in float32.

    peft initialises them with norms taken in the type of the weights, but divides by norms taken
    in float32, so the layer would not start equal to the base model. For convolutions, peft takes
    both in the type of the weights.
    """
    for layer in module.modules():
        if isinstance(layer, LoraLayer) and ADAPTER in layer.lora_magnitude_vector:
            base, dora = layer.get_base_layer(), cast(Any, layer.lora_magnitude_vector[ADAPTER])
            if isinstance(base, nn.Linear):
                dora.update_layer(
                    base_layer=base,
                    lora_A=layer.lora_A[ADAPTER].weight,
                    lora_B=layer.lora_B[ADAPTER].weight,
                    scaling=layer.scaling[ADAPTER],
                )


def adapter_shapes(
    config: TrainingConfig, module: nn.Module, targets: Sequence[str]
) -> dict[str, tuple[int, ...]]:
    """Saved name of each adapter tensor of these layers → its shape.

    Args:
        module: on the meta device. The adapter is added to it.

    Raises:
        TargetError: peft has no such adapter for one of the layers.
    """
    if config.lora_method == "oft":
        for name in targets:
            _require_rotatable(name, module.get_submodule(name), config.oft_block_size)
    # Parts of a component share a module, which may hold the adapter of another part already.
    before = {name for name, _ in module.named_parameters()}
    settings = peft_settings(config.adapter, targets)
    try:
        # `low_cpu_mem_usage` creates the adapter on the meta device, too.
        inject_adapter_in_model(settings, module, ADAPTER, low_cpu_mem_usage=True)
    except (ValueError, TypeError, RuntimeError) as error:
        raise TargetError(
            f"{config.lora_method} is not possible for these layers: {reason_of(error)}",
            where="lora_base_model, lora_target_modules, lora_method",
            do="choose other layers or another method",
        ) from error
    return {
        saved_name(name): tuple(parameter.shape)
        for name, parameter in module.named_parameters()
        if is_adapter(name) and name not in before
    }


def _require_rotatable(name: str, layer: Any, block: int) -> None:
    """Check that OFT can rotate the inputs of a layer in whole blocks.

    For a convolution with a window, peft rotates the input of each window position and adds up the
    overlaps. This differs from the base model even before the first step.

    Raises:
        TargetError: OFT cannot be applied to the layer.
    """
    where = f"lora_method = oft, the layer {name}"
    # The inputs of one output value.
    width = layer.weight[0].numel()
    if isinstance(layer, nn.Conv2d) and (layer.kernel_size != (1, 1) or layer.groups > 1):
        raise TargetError(
            f"oft cannot rotate the windows of a convolution of {layer.kernel_size}",
            where=where,
            do="leave it out of lora_target_modules, or train it by another lora_method",
        )
    # A rotation is made of square blocks along the inputs.
    if width % block:
        raise TargetError(
            f"a width of {width} is no multiple of oft_block_size = {block}",
            where=where,
            do="give a divisor of all widths as oft_block_size, or leave the layer out of "
            "lora_target_modules",
        )
