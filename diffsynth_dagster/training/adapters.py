"""What LoRA and its relatives put into layers: made by peft, in float32, with values of a seed.

lora: W + s B A (Hu et al. 2021, arXiv:2106.09685), s = alpha / rank.
dora: m (W + s B A) / |W + s B A| for each output (Liu et al. 2024, arXiv:2402.09353).
lokr: W + s w1 ⊗ w2, a Kronecker product, w2 of a rank (Yeh et al. 2023, arXiv:2309.14859).
oft: W R, where R rotates blocks of the inputs (Qiu et al. 2023, arXiv:2306.07280).

All of them start as the base model.
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
_KEY = re.compile(rf"\.((?:lora|lokr|oft)_\w+)\.{ADAPTER}(?=\.|$)")
_MAGNITUDE = "lora_magnitude_vector"
_ALWAYS = -1.0
"""peft draws a number in [0, 1) in every step, and applies LoKr where it is above the probability
of leaving it out. 0 itself would leave it out once in 2^24 draws."""


def is_adapter(name: str) -> bool:
    """Whether a parameter of a module is one that `add_adapter` put there."""
    return _KEY.search(name) is not None


def saved_name(name: str) -> str:
    """Name of a parameter in saved files: without the adapter's own name."""
    saved = _KEY.sub(r".\1", name)
    return saved.removesuffix(".weight") if saved.endswith(f".{_MAGNITUDE}.weight") else saved


def peft_settings(settings: Mapping[str, Any], targets: Sequence[str]) -> PeftConfig:
    """peft's configuration of an adapter.

    Args:
        settings: `TrainingConfig.adapter`, or what a file says of itself.
        targets: the layers that get it.
    """
    own, layers = dict(settings), list(targets)
    method = own.pop("method", "lora")
    if method == "oft":
        return OFTConfig(**own, target_modules=layers)
    rank, alpha = own.pop("rank"), own.pop("alpha")
    if method == "lokr":
        return LoKrConfig(r=rank, alpha=alpha, **own, target_modules=layers)
    return LoraConfig(
        r=rank, lora_alpha=alpha, use_dora=method == "dora", **own, target_modules=layers
    )


def add_adapter(config: TrainingConfig, module: nn.Module, targets: Sequence[str]) -> None:
    """Put what is trained into the layers of a module, in float32.

    The initial values depend on the seed alone.

    Args:
        targets: full names of the layers.
    """
    settings = peft_settings(config.adapter, targets)
    if isinstance(settings, LoraConfig):
        settings.lora_dropout = config.lora_dropout
    if isinstance(settings, LoKrConfig):
        settings.module_dropout = _ALWAYS
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        inject_adapter_in_model(settings, module, adapter_name=ADAPTER)
    for name, parameter in module.named_parameters():
        if is_adapter(name):
            parameter.data = parameter.data.float()
    if config.lora_method == "dora":
        _measure_in_float32(module)


def _measure_in_float32(module: nn.Module) -> None:
    """Give DoRA's linear layers the lengths of their weights anew: peft measured them in the element
    type of the weights, and divides by what it measures in float32. Of convolutions it measures both
    in that type."""
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
    """Saved name of each tensor that is trained in these layers → its shape.

    Args:
        module: on the meta device; the layers are changed in it.

    Raises:
        TargetError: peft has no such adapter for one of the layers.
    """
    if config.lora_method == "oft":
        for name in targets:
            _require_rotatable(name, module.get_submodule(name), config.oft_block_size)
    before = {name for name, _ in module.named_parameters()}
    settings = peft_settings(config.adapter, targets)
    try:
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

    peft rotates what each place of a convolution's window sees and adds up the overlaps, which is
    another function even before the first step.

    Raises:
        TargetError: it cannot.
    """
    where = f"lora_method = oft, the layer {name}"
    width = layer.weight[0].numel()
    if isinstance(layer, nn.Conv2d) and (layer.kernel_size != (1, 1) or layer.groups > 1):
        raise TargetError(
            f"oft cannot rotate the windows of a convolution of {layer.kernel_size}",
            where=where,
            do="leave it out of lora_target_modules, or train it by another lora_method",
        )
    if width % block:
        raise TargetError(
            f"a width of {width} is no multiple of oft_block_size = {block}",
            where=where,
            do="give a divisor of all widths as oft_block_size, or leave the layer out of "
            "lora_target_modules",
        )
