"""LoRAs in the format of DiffSynth-Studio's trainer: its own names of layers, without a prefix or
with `pipe.<component>.`, and `.default` after lora_A and lora_B. They have no alpha."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import nn

from diffsynth_dagster.families.lora import Lora
from diffsynth_dagster.families.sampling_types import Tensors
from diffsynth_dagster.formats.comfyui import loaded_by_names
from diffsynth_dagster.formats.contract import AllRules, Loras, NamedTensors
from diffsynth_dagster.formats.names import renamed, with_dots
from diffsynth_dagster.formats.reading import read_as


@dataclass(frozen=True)
class Guide:
    """See `Format`.

    Attributes:
        starts: component → prefix of its layers. Without an entry it is empty for the first
            component, and `pipe.<component>.` for others.
    """

    starts: Mapping[str, str] = field(default_factory=dict[str, str])

    def write(self, loras: Loras, rules: AllRules) -> NamedTensors:
        tensors: Tensors = {}
        for number, (name, lora) in enumerate(loras.items()):
            theirs = renamed("guide", lora.folded(), rules[name])
            start = self.starts.get(name, f"pipe.{name}." if number else "")
            tensors |= with_dots(start, theirs, alphas=False, infix=".default")
        return NamedTensors(tensors)

    def read(self, tensors: Tensors, rules: AllRules) -> dict[str, Lora]:
        return read_as("guide", tensors, rules)

    def try_load(
        self, spelled: NamedTensors, name: str, module: nn.Module, rules: AllRules
    ) -> Lora:
        return loaded_by_names(spelled, name, module, rules, rules[name].read_by_guide)


FORMAT = Guide()
