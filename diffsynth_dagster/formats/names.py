"""What several formats share when they write files."""

import torch

from diffsynth_dagster.families.lora import Lora, LoraFormat, LoraRules
from diffsynth_dagster.families.sampling_types import Tensors
from diffsynth_dagster.formats.reading import names_in


def renamed(format_name: LoraFormat, lora: Lora, rules: LoraRules) -> Lora:
    """Rename the layers of a LoRA to their names in a format.

    Raises:
        KeyError: a layer has no name in the format.
    """
    names = names_in(format_name, rules)
    # Some tools ignore the alphas of these components: multiply s into B, so that alpha = rank.
    lora = lora.folded() if rules.folds else lora
    return lora if names is None else names.to_theirs(lora)


def lora_of(tensors: Tensors, scale: float) -> Lora:
    """The LoRA in tensors `<layer>.lora_A.weight` and `.lora_B.weight`, with one s for all layers."""
    down, up = (
        {n.removesuffix(end): t for n, t in tensors.items() if n.endswith(end)}
        for end in (".lora_A.weight", ".lora_B.weight")
    )
    return Lora(down, up, dict.fromkeys(down, scale))


def with_dots(start: str, lora: Lora, alphas: bool, infix: str = "") -> Tensors:
    """Name the tensors of a LoRA `<start><layer>.lora_A.weight`, `.lora_B.weight` and `.alpha`.

    Args:
        alphas: whether to write alpha, a tensor of shape ().
        infix: text after `lora_A` and `lora_B`.
    """
    tensors: Tensors = {}
    for layer, a in lora.down.items():
        tensors[f"{start}{layer}.lora_A{infix}.weight"] = a
        tensors[f"{start}{layer}.lora_B{infix}.weight"] = lora.up[layer]
        if alphas:
            tensors[f"{start}{layer}.alpha"] = torch.tensor(lora.alpha(layer))
    return tensors
