"""Layer names of a model's authors, whose layers may fuse several of diffusers' layers.

`AuthorsNames` is a table that says which diffusers layers ("ours") are stacked along the rows of
one layer of the authors ("theirs"), such as Q, K and V in `qkv`. It converts weights to diffusers'
names, and LoRAs in both directions.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate, pairwise

import torch

from diffsynth_dagster.families.lora import Lora
from diffsynth_dagster.families.sampling_types import Tensors


def swapped(rows: torch.Tensor) -> torch.Tensor:
    """Swap the two halves of a tensor (rows, …)."""
    return torch.cat(rows.chunk(2)[::-1])


def _numberless(name: str, dot: str) -> str:
    """Replace the block number of a name with `*`."""
    start, number, rest = _first_number(name, dot)
    return name if number is None else f"{start}{dot}*{dot}{rest}"


def _numbered(pattern: str, name: str, dot: str) -> str:
    """Replace the `*` of a pattern with the block number of `name`."""
    return pattern.replace("*", _first_number(name, dot)[1] or "")


def _first_number(name: str, dot: str) -> tuple[str, str | None, str]:
    """Split a name into the parts before, at and after its block number, or (name, None, "")."""
    match = re.fullmatch(rf"([a-z_]+?){re.escape(dot)}(\d+){re.escape(dot)}(.+)", name)
    return (name, None, "") if match is None else (match[1], match[2], match[3])


@dataclass(frozen=True)
class AuthorsNames:
    """How the authors of a model name the layers of its denoiser.

    Attributes:
        blocks: their list of numbered blocks → (our list, their layer → our layers, stacked from
            top to bottom). If several of their layers contain one of ours, the first is written.
        outside: their layer outside the blocks → our layer.
        heights: suffix of our layer's name → its number of rows, as a multiple of the other layers
            that it is stacked with. The default is 1.
        swaps: their layers whose halves (shift, scale) are in the other order in ours.
        prefix: optional prefix of tensor names in their files.
        kinds: last part of their tensor names → ours, if different (`scale` → `weight`).
    """

    blocks: Mapping[str, tuple[str, Mapping[str, tuple[str, ...]]]]
    outside: Mapping[str, str] = field(default_factory=dict[str, str])
    heights: Mapping[str, int] = field(default_factory=dict[str, int])
    swaps: tuple[str, ...] = ()
    prefix: str = ""
    kinds: Mapping[str, str] = field(default_factory=dict[str, str])

    def converted(self, tensors: Tensors) -> Tensors:
        """Convert the authors' weights to diffusers' names and layers. Unknown names stay.

        Raises:
            RuntimeError: the number of rows cannot be divided among the stacked layers.
        """
        renamed: Tensors = {}
        for name, tensor in tensors.items():
            name = name.removeprefix(self.prefix)
            theirs, _, kind = name.rpartition(".")
            layers = self._layers(theirs)
            # Unknown, or already our name: some layers are called the same on both sides.
            if not layers or theirs == layers[0]:
                renamed[name] = tensor
                continue
            if theirs in self.swaps:
                tensor = swapped(tensor)
            # Clones, so that the parts do not keep the whole fused tensor in memory.
            parts = [p.clone() for p in self._split(tensor, layers)] if layers[1:] else [tensor]
            kind = self.kinds.get(kind, kind)
            renamed |= {f"{layer}.{kind}": part for layer, part in zip(layers, parts, strict=True)}
        return renamed

    def ours(self, name: str) -> tuple[str, ...]:
        """Our layers that a layer contains; empty if it is unknown.

        Args:
            name: the authors' name or ours, which some training scripts write, with dots or
                underscores.
        """
        layers = self._layers(self._dotted(name))
        if layers:
            return layers
        if "." in name:
            return (name,) if self.theirs(name) is not None else ()
        # First as a layer outside the blocks, whose name may contain a number too.
        for pattern in (name, _numberless(name, "_")):
            if pattern in self._ours_with_underscores:
                return (_numbered(self._ours_with_underscores[pattern], name, "_"),)
        return ()

    def theirs(self, layer: str) -> str | None:
        """The authors' layer that contains one of our layers; None if they have no such layer."""
        for theirs, ours in self.outside.items():
            if layer == ours:
                return theirs
        known = self._theirs_of.get(_numberless(layer, "."))
        return None if known is None else _numbered(known, layer, ".")

    def to_theirs(self, lora: Lora) -> Lora:
        """Convert a LoRA from diffusers' names to the authors'.

        Layers that the authors fuse become one LoRA: their A are stacked, their B form a block
        diagonal, and layers without a LoRA are zero. The rank is the sum of the ranks. The scale
        s = alpha / rank stays, so the update of the weights is the same.

        Raises:
            KeyError: the authors have no name for a layer.
        """
        down: Tensors = {}
        up: Tensors = {}
        scale: dict[str, float] = {}
        named = {layer: self.theirs(layer) for layer in lora.down}
        for theirs in dict.fromkeys(named.values()):
            if theirs is None:
                raise KeyError(next(layer for layer, name in named.items() if name is None))
            layers = self._layers(theirs)
            first = next(layer for layer in layers if layer in lora.down)
            scale[theirs] = lora.scale[first]
            if len(layers) == 1:
                down[theirs], b = lora.down[first], lora.up[first]
            else:
                down[theirs], b = self._stacked(lora, layers, first)
            up[theirs] = swapped(b) if theirs in self.swaps else b
        return Lora(down, up, scale)

    def _stacked(
        self, lora: Lora, layers: Sequence[str], first: str
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The A and B of a fused layer.

        Args:
            layers: our layers, from top to bottom.
            first: the first of them that has a LoRA. Its scale becomes that of the fused layer.
        """
        heights = self._heights(layers)
        zero_a, b = torch.zeros_like(lora.down[first]), lora.up[first]
        unit = len(b) // heights[layers.index(first)]
        ups: list[torch.Tensor] = []
        for layer, height in zip(layers, heights, strict=True):
            up = lora.up.get(layer, b.new_zeros(unit * height, b.shape[1]))
            # A fused layer has one scale. Differences to it go into B.
            ratio = lora.scale.get(layer, lora.scale[first]) / lora.scale[first]
            ups.append(up if ratio == 1 else up * ratio)
        a = torch.cat([lora.down.get(layer, zero_a) for layer in layers])
        return a.contiguous(), torch.block_diag(*ups)

    def to_ours(self, lora: Lora) -> Lora:
        """Convert a LoRA from the authors' names (dotted or in kohya's form) to diffusers' names.

        A fused layer becomes one LoRA per layer. If its B is block diagonal, each gets its own part
        of A, otherwise the whole A.

        Raises:
            RuntimeError: the number of rows cannot be divided among the stacked layers.
        """
        down: Tensors = {}
        up: Tensors = {}
        scale: dict[str, float] = {}
        for name, a in lora.down.items():
            layers, b = self.ours(name), lora.up[name]
            b = swapped(b) if self._dotted(name) in self.swaps else b
            parts = self._separate(a, b, layers) if len(layers) > 1 else [(a, b)]
            for layer, (part_a, part_b) in zip(layers, parts, strict=True):
                # All zeros: `to_theirs` filled in a layer without a LoRA.
                if len(layers) > 1 and not part_a.any():
                    continue
                down[layer], up[layer], scale[layer] = part_a, part_b, lora.scale[name]
        return Lora(down, up, scale)

    @cached_property
    def _block(self) -> re.Pattern[str]:
        """Matches their layer in a block. Groups: list, separator (`.` or `_`), number, layer."""
        return re.compile(rf"({'|'.join(map(re.escape, self.blocks))})([._])(\d+)\2(.+)")

    @cached_property
    def _theirs_of(self) -> dict[str, str]:
        """Our layer in a block → theirs, both with `*` for the number."""
        # Reversed, so that the first of several names of a layer overwrites the others.
        return {
            f"{ours}.*.{layer}": f"{theirs}.*.{name}"
            for theirs, (ours, table) in self.blocks.items()
            for name, layers in reversed(list(table.items()))
            for layer in layers
        }

    @cached_property
    def _ours_with_underscores(self) -> dict[str, str]:
        """Our layer in kohya's form → with dots; `*` for the block number."""
        named = (*self._theirs_of, *self.outside.values())
        return {name.replace(".", "_"): name for name in named}

    def _layers(self, theirs: str) -> tuple[str, ...]:
        """Our layers that one of the authors' layers contains; empty if it is unknown."""
        match = self._block.fullmatch(theirs)
        if match is None:
            return (self.outside[theirs],) if theirs in self.outside else ()
        ours, table = self.blocks[match[1]]
        return tuple(f"{ours}.{match[3]}.{layer}" for layer in table.get(match[4], ()))

    def _dotted(self, name: str) -> str:
        """`double_blocks_0_img_attn_qkv` → `double_blocks.0.img_attn.qkv`. Unknown names stay."""
        # Only the table tells which underscores were dots: names contain underscores themselves.
        match = self._block.fullmatch(name)
        table = self.outside if match is None else self.blocks[match[1]][1]
        rest = name if match is None else match[4]
        known = next((layer for layer in table if layer.replace(".", "_") == rest), rest)
        return known if match is None else f"{match[1]}.{match[3]}.{known}"

    def _heights(self, layers: Sequence[str]) -> list[int]:
        """The relative numbers of rows of stacked layers: see `heights`."""
        if len(layers) == 1:
            return [1]
        heights = self.heights.items()
        return [next((h for suffix, h in heights if layer.endswith(suffix)), 1) for layer in layers]

    def _split(self, rows: torch.Tensor, layers: Sequence[str]) -> list[torch.Tensor]:
        """Split a tensor (rows, …) of one of the authors' layers into those of our layers."""
        heights = self._heights(layers)
        unit, rest = divmod(len(rows), sum(heights))
        if rest:
            raise RuntimeError(f"{len(rows)} rows cannot be those of {', '.join(layers)}")
        return list(rows.split([unit * height for height in heights]))

    def _separate(
        self, down: torch.Tensor, up: torch.Tensor, layers: Sequence[str]
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Split the A and B of one of the authors' layers into those of our layers."""
        rows = self._split(up, layers)
        rank, rest = divmod(len(down), len(layers))
        edges = list(pairwise(accumulate([rank] * len(layers), initial=0)))
        parts = list(zip(edges, rows, strict=True))
        # Not block diagonal: each layer's B uses all of A. Clones, because safetensors refuses to
        # save tensors that share memory.
        if rest or any(b[:, :i].any() or b[:, j:].any() for (i, j), b in parts):
            return [(down.clone(), b.contiguous()) for b in rows]
        return [(down[i:j].contiguous(), b[:, i:j].contiguous()) for (i, j), b in parts]
