"""What a LoRA format is."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from torch import nn

from diffsynth_dagster.families.lora import Lora, LoraRules
from diffsynth_dagster.families.making import Tensors


class Unread(ValueError):
    """A file that is not understood whole."""


Loras = Mapping[str, Lora]
"""Component → its LoRA, by the names of the module's layers."""
AllRules = Mapping[str, LoraRules]
"""Component → its rules; a file that names no component is one of the first."""


@dataclass(frozen=True)
class Spelled:
    """What a file holds.

    Attributes:
        notes: the text entries of its header that belong to the format.
    """

    tensors: Tensors
    notes: Mapping[str, str] = field(default_factory=dict[str, str])


class Format(Protocol):
    """A LoRA format: the names that a tool gives the tensors of a file."""

    def write(self, loras: Loras, rules: AllRules) -> Spelled:
        """The LoRAs of some components as one file.

        Raises:
            KeyError: a layer has no name in this format.
        """
        ...

    def read(self, tensors: Tensors, rules: AllRules) -> dict[str, Lora]:
        """The LoRAs in a file of this format.

        Raises:
            Unread: a key is not understood.
        """
        ...

    def try_load(self, spelled: Spelled, name: str, module: nn.Module, rules: AllRules) -> Lora:
        """The LoRA of a component as the tool that the format is meant for applies it.

        Args:
            module: the component's, which may be on the meta device. It is changed.

        Raises:
            Unread: the tool refuses the file, or leaves keys out.
        """
        ...
