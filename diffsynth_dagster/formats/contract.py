"""The contract of a LoRA format."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from torch import nn

from diffsynth_dagster.families.lora import Lora, LoraRules
from diffsynth_dagster.families.sampling_types import Tensors


# Not a `UserError`: whoever reads a file knows its path and what to tell the user.
class UnreadableLora(ValueError):
    """Some key of a file is not understood, or a tool would not apply all of the file."""


Loras = Mapping[str, Lora]
"""Component → its LoRA, whose layers have the names of the module."""
AllRules = Mapping[str, LoraRules]
"""Component → its rules. A file whose names contain no component belongs to the first one."""


@dataclass(frozen=True)
class NamedTensors:
    """The content of a LoRA file in some format.

    Attributes:
        notes: the text entries of the header that belong to the format.
    """

    tensors: Tensors
    notes: Mapping[str, str] = field(default_factory=dict[str, str])


class Format(Protocol):
    """A LoRA format: how a tool names the tensors of a file."""

    def write(self, loras: Loras, rules: AllRules) -> NamedTensors:
        """Convert the LoRAs of components to the content of one file.

        Raises:
            KeyError: a layer has no name in this format.
        """
        ...

    def read(self, tensors: Tensors, rules: AllRules) -> dict[str, Lora]:
        """Component → its LoRA, from the tensors of a file of this format.

        Raises:
            UnreadableLora: a key is not understood.
        """
        ...

    def try_load(
        self, spelled: NamedTensors, name: str, module: nn.Module, rules: AllRules
    ) -> Lora:
        """The LoRA of a component as the tool that the format is made for would apply it.

        An export is verified this way: the result must equal the LoRA that was trained.

        Args:
            module: the module of the component, possibly on the meta device. It is modified.

        Raises:
            UnreadableLora: the tool refuses the file or skips some of its keys.
        """
        ...
