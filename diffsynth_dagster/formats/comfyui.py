"""LoRAs in the format of ComfyUI, which most other tools read too: `diffusion_model.`, then the
layer by the name that the model's authors give it, then `lora_A`, `lora_B` or `alpha`."""

from torch import nn

from diffsynth_dagster.families.lora import Lora, LoraFormat
from diffsynth_dagster.families.sampling_types import Tensors
from diffsynth_dagster.formats.contract import AllRules, Loras, NamedTensors, UnreadableLora
from diffsynth_dagster.formats.names import renamed, with_dots
from diffsynth_dagster.formats.reading import read_all, read_as


class ComfyUI:
    """See `Format`."""

    def write(self, loras: Loras, rules: AllRules) -> NamedTensors:
        tensors: Tensors = {}
        for name, lora in loras.items():
            theirs = renamed("comfyui", lora, rules[name])
            tensors |= with_dots(f"{rules[name].comfyui}.", theirs, alphas=True)
        return NamedTensors(tensors)

    def read(self, tensors: Tensors, rules: AllRules) -> dict[str, Lora]:
        return read_as("comfyui", tensors, rules)

    def try_load(
        self, spelled: NamedTensors, name: str, module: nn.Module, rules: AllRules
    ) -> Lora:
        return loaded_by_names(spelled, name, module, rules, rules[name].read_by_comfyui)


def loaded_by_names(
    spelled: NamedTensors,
    name: str,
    module: nn.Module,
    rules: AllRules,
    formats: tuple[LoraFormat, ...],
) -> Lora:
    """The LoRA of a component as a tool applies it that looks up each layer by name.

    Such a tool takes alpha from tensors only, and ignores the header.

    Args:
        formats: the formats whose names the tool knows.

    Raises:
        UnreadableLora: the tool would skip some keys.
    """
    found = read_all(spelled.tensors, rules, formats).get(name)
    if found is None:
        raise UnreadableLora(f"it finds no layer of {name}")
    # A name may follow the rules of the format and still not be a layer of this model.
    layers = dict(module.named_modules())
    unknown = next((layer for layer in found.lora.down if layer not in layers), None)
    if unknown is not None:
        raise UnreadableLora(f"it finds no layer '{unknown}'")
    return found.lora


FORMAT = ComfyUI()
