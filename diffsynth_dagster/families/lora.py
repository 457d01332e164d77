"""What a LoRA is, and what a component declares of its own: which layers get one, and their names in
the files of other tools."""

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
        """alpha of a layer: s times its rank."""
        return self.scale[layer] * len(self.down[layer])

    def folded(self) -> "Lora":
        """The same change of the weights with s = 1 everywhere: B is multiplied by s."""
        up = {n: b if self.scale[n] == 1 else b * self.scale[n] for n, b in self.up.items()}
        return Lora(self.down, up, dict.fromkeys(self.down, 1.0))

    def part(self, layers: Mapping[str, str]) -> "Lora":
        """Some of its layers under other names: layer → new name."""
        return Lora(
            {new: self.down[old] for old, new in layers.items()},
            {new: self.up[old] for old, new in layers.items()},
            {new: self.scale[old] for old, new in layers.items()},
        )


class LayerNames(Protocol):
    """The names that somebody else gives the layers of a component."""

    def ours(self, name: str) -> tuple[str, ...]:
        """The layers here that one of theirs holds, one above another; none where it is unknown.

        Args:
            name: with dots, or with underscores for them as in kohya's files.
        """
        ...

    def theirs(self, layer: str) -> str | None:
        """The layer there that holds a layer of here, with dots; None where it has no name there."""
        ...

    def to_theirs(self, lora: Lora) -> Lora:
        """A LoRA by the names here → by theirs, in which several layers may be one.

        Raises:
            KeyError: a layer has no name there.
        """
        ...

    def to_ours(self, lora: Lora) -> Lora:
        """A LoRA by their names (that `ours` knows) → by those here.

        Raises:
            RuntimeError: a layer that is several here cannot have its size.
        """
        ...


@dataclass(frozen=True)
class LoraRules:
    """What a component declares of its LoRAs.

    Attributes:
        folder: how the names of its layers start in diffusers' files, without the dot.
        load: (its meta module, tensors, header) loads a file the way the family's pipeline of
            diffusers does; raises what that raises.
        targets: the layers that get a LoRA when none are named.
        aliases: name of a layer in other tools → globs of its names here.
        authors: the names that the model's authors give its layers, and ComfyUI; None where they are
            those of diffusers.
        guide: the names in DiffSynth-Studio; None where they are those of diffusers.
        comfyui: how names start in ComfyUI's files, without the dot.
        kohya: how names start in the files of kohya's scripts: the first is written, all are read.
        kohya_names: the layers' names there, where they are not the authors'.
        native: the format of checkpoints: of those that DiffSynth-Studio reads, the one that most other
            tools read.
        exports: the formats of exports where none are asked for.
        read_by_comfyui, read_by_guide: the formats that ComfyUI and DiffSynth-Studio read.
        folds: whether a tool that reads the native format takes alpha = rank whatever the file says:
            then B is multiplied by s in every file, and alpha is the rank.
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
