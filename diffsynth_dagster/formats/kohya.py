"""LoRAs in the format of kohya's scripts, which ComfyUI reads too: `lora_unet_`, then the layer by
its authors' name with `_` for each dot, then `lora_down`, `lora_up` or `alpha`."""

import torch
from torch import nn

from diffsynth_dagster.families.lora import Lora
from diffsynth_dagster.families.sampling_types import Tensors
from diffsynth_dagster.formats.comfyui import loaded_by_names
from diffsynth_dagster.formats.contract import AllRules, Loras, NamedTensors
from diffsynth_dagster.formats.names import renamed
from diffsynth_dagster.formats.reading import read_as


class Kohya:
    """See `Format`."""

    def write(self, loras: Loras, rules: AllRules) -> NamedTensors:
        tensors: Tensors = {}
        for name, lora in loras.items():
            theirs = renamed("kohya", lora, rules[name])
            for layer, a in theirs.down.items():
                key = rules[name].kohya[0] + layer.replace(".", "_")
                tensors[f"{key}.lora_down.weight"] = a
                tensors[f"{key}.lora_up.weight"] = theirs.up[layer]
                tensors[f"{key}.alpha"] = torch.tensor(theirs.alpha(layer))
        return NamedTensors(tensors)

    def read(self, tensors: Tensors, rules: AllRules) -> dict[str, Lora]:
        return read_as("kohya", tensors, rules)

    def try_load(
        self, spelled: NamedTensors, name: str, module: nn.Module, rules: AllRules
    ) -> Lora:
        return loaded_by_names(spelled, name, module, rules, rules[name].read_by_comfyui)


FORMAT = Kohya()
