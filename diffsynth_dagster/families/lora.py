"""What a LoRA is, and what a component declares about its LoRAs: which layers get one, and what
other tools call these layers."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol

from torch import nn

from diffsynth_dagster.families.sampling_types import Tensors

LoraFormat = Literal["diffusers", "comfyui", "guide", "kohya", "peft"]


@dataclass(frozen=True)
class Lora:
    """A LoRA: W becomes W + s B A (Hu et al. 2021, arXiv:2106.09685).

    Attributes:
        down: layer → A (rank, in features, …).
        up: layer → B (out features, rank, …).
        scale: layer → s = alpha / rank.
    """

    down: Tensors
    up: Tensors
    scale: Mapping[str, float]

    def alpha(self, layer: str) -> float:
        """alpha of a layer: s times the rank."""
        return self.scale[layer] * len(self.down[layer])

    def folded(self) -> "Lora":
        """The same update of the weights with s = 1 everywhere: B is multiplied by s."""
        up = {n: b if self.scale[n] == 1 else b * self.scale[n] for n, b in self.up.items()}
        return Lora(self.down, up, dict.fromkeys(self.down, 1.0))

    def part(self, layers: Mapping[str, str]) -> "Lora":
        """Some of the layers, renamed.

        Args:
            layers: layer → new name.
        """
        return Lora(
            {new: self.down[old] for old, new in layers.items()},
            {new: self.up[old] for old, new in layers.items()},
            {new: self.scale[old] for old, new in layers.items()},
        )


class LayerNames(Protocol):
    """Maps the layer names of our modules (diffusers', "ours") to those of another tool ("theirs").

    One of their layers may contain several of ours, stacked along the rows (Q, K and V in `qkv`).
    """

    def ours(self, name: str) -> tuple[str, ...]:
        """Our layers that one of their layers contains, from top to bottom; empty if it is unknown.

        Args:
            name: their layer, with dots, or with underscores instead of dots as in kohya's files.
        """
        ...

    def theirs(self, layer: str) -> str | None:
        """Their layer that contains one of our layers, with dots; None if they do not name it."""
        ...

    def to_theirs(self, lora: Lora) -> Lora:
        """Convert a LoRA from our names to theirs. Several of our layers may become one.

        Raises:
            KeyError: they have no name for a layer.
        """
        ...

    def to_ours(self, lora: Lora) -> Lora:
        """Convert a LoRA from their names, which `ours` must know, to ours.

        Raises:
            RuntimeError: a layer has a size that cannot be split into our layers.
        """
        ...


@dataclass(frozen=True)
class LoraRules:
    """What a component declares about its LoRAs. "The guide" is DiffSynth-Studio.

    Attributes:
        folder: prefix of the layer names in diffusers' files, without the dot.
        load: (module on the meta device, tensors, file header) → loads a file the way the family's
            diffusers pipeline does, and raises the same exceptions.
        targets: the layers that get a LoRA by default.
        aliases: layer name in other tools → globs of our layer names.
        authors: layer names of the model's authors, which ComfyUI uses too; None if they are the
            same as diffusers'.
        guide: layer names in DiffSynth-Studio; None if they are the same as diffusers'.
        comfyui: prefix in ComfyUI's files, without the dot.
        kohya: prefixes in the files of kohya's scripts. The first is written, all are read.
        kohya_names: layer names in kohya's files; None if they are the same as the authors'.
        native: the format of checkpoints. Of the formats that DiffSynth-Studio reads, the one that
            most other tools read too.
        exports: the formats of an export by default.
        read_by_comfyui, read_by_guide: the formats that ComfyUI and DiffSynth-Studio read.
        folds: True if a reader of the native format ignores alpha and assumes alpha = rank. Then
            every file has B multiplied by s, and alpha = rank.
    """

    folder: str
    load: Callable[[nn.Module, Tensors, Mapping[str, object]], None]
    targets: tuple[str, ...] = ()
    aliases: Mapping[str, tuple[str, ...]] = field(default_factory=dict[str, tuple[str, ...]])
    authors: LayerNames | None = None
    guide: LayerNames | None = None
    comfyui: str = "diffusion_model"
    kohya: tuple[str, ...] = ("lora_unet_",)
    kohya_names: LayerNames | None = None
    native: LoraFormat = "comfyui"
    exports: tuple[LoraFormat, ...] = ("diffusers",)
    read_by_comfyui: tuple[LoraFormat, ...] = ("comfyui", "kohya")
    read_by_guide: tuple[LoraFormat, ...] = ("guide", "comfyui")
    folds: bool = False
