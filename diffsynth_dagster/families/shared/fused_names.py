"""Names of layers by a model's authors, where one layer there may hold several layers here.

A table (`AuthorsNames`) says which layers of a module of diffusers stand one above another in one
layer of the authors (Q, K and V in `qkv`). It converts weights, and LoRAs in both directions: as
ComfyUI has them, with the authors' dots, and as kohya's scripts, with underscores.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate, pairwise

import torch

from diffsynth_dagster.families.contract import Tensors

KOHYA = "lora_unet_"
"""How the names of a denoiser's layers start in kohya's LoRAs."""


def swapped(rows: torch.Tensor) -> torch.Tensor:
    """The halves of a tensor (rows, …) exchanged."""
    return torch.cat(rows.chunk(2)[::-1])


@dataclass(frozen=True)
class AuthorsNames:
    """How the authors of a model name the layers of its denoiser.

    Attributes:
        blocks: numbered list of blocks there → its name here, and layer there → the layers here
            that stand one above another in it.
        outside: layer outside the blocks there → here.
        heights: end of a layer's name here → how many times as high it is as the layers that it
            stands with. Layers that are not named are equally high.
        swaps: layers there whose halves (shift, scale) are the other way round here.
        prefix: how the names of tensors may start in the authors' files.
        kinds: last part of a tensor's name there → here, where they differ.
    """

    blocks: Mapping[str, tuple[str, Mapping[str, tuple[str, ...]]]]
    outside: Mapping[str, str] = field(default_factory=dict[str, str])
    heights: Mapping[str, int] = field(default_factory=dict[str, int])
    swaps: tuple[str, ...] = ()
    prefix: str = ""
    kinds: Mapping[str, str] = field(default_factory=dict[str, str])

    def converted(self, tensors: Tensors) -> Tensors:
        """The authors' weights → diffusers' names and tensors. Other names stay as they are.

        Raises:
            RuntimeError: the heights are not those of the layers that stand one above another.
        """
        renamed: Tensors = {}
        for name, tensor in tensors.items():
            name = name.removeprefix(self.prefix)
            theirs, _, kind = name.rpartition(".")
            layers = self._layers(theirs)
            if not layers or theirs == layers[0]:
                renamed[name] = tensor
                continue
            if theirs in self.swaps:
                tensor = swapped(tensor)
            parts = [p.clone() for p in self._split(tensor, layers)] if layers[1:] else [tensor]
            kind = self.kinds.get(kind, kind)
            renamed |= {f"{layer}.{kind}": part for layer, part in zip(layers, parts, strict=True)}
        return renamed

    def to_kohya(self, tensors: Tensors, alpha: float) -> Tensors:
        """A LoRA by diffusers' names → the keys `lora_unet_…` of kohya's scripts and ComfyUI.

        Layers that are one layer there become one LoRA with the A of each stacked and the B of each
        on the diagonal; layers without a LoRA have zeros. Its rank is that of all together, and
        alpha grows with it, so that the product is the same to the bit.

        Args:
            tensors: `<layer>.lora_A.weight` (rank, in) and `<layer>.lora_B.weight` (out, rank).
        """
        down = {n.removesuffix(".lora_A.weight"): t for n, t in tensors.items() if ".lora_A." in n}
        renamed: Tensors = {}
        for theirs in dict.fromkeys(self._theirs(layer) for layer in down):
            layers = self._layers(theirs)
            shares = self._shares(layers)
            first = next(layer for layer in layers if layer in down)
            no_a = torch.zeros_like(down[first])
            b = tensors[f"{first}.lora_B.weight"]
            unit = len(b) // shares[layers.index(first)]
            a_of_each = [down.get(layer, no_a) for layer in layers]
            b_of_each = [
                tensors.get(f"{layer}.lora_B.weight", b.new_zeros(unit * share, b.shape[1]))
                for layer, share in zip(layers, shares, strict=True)
            ]
            up = torch.block_diag(*b_of_each)
            key = KOHYA + theirs.replace(".", "_")
            renamed[f"{key}.lora_down.weight"] = torch.cat(a_of_each).contiguous()
            renamed[f"{key}.lora_up.weight"] = swapped(up) if theirs in self.swaps else up
            renamed[f"{key}.alpha"] = torch.tensor(alpha * len(layers))
        return renamed

    def from_authors(self, tensors: Tensors) -> Tensors:
        """A LoRA by the authors' names, dotted or as kohya writes them → by diffusers' names.

        A layer of several whose B is not block-diagonal gives each of them the whole A. Unknown
        layers keep their names, so that the message about a LoRA that does not fit can show them.

        Args:
            tensors: `<layer>.lora_A.weight` (rank, in), `.lora_B.weight` (out, rank), `.alpha` ().

        Raises:
            RuntimeError: the heights are not those of the layers that stand one above another.
        """
        renamed: Tensors = {}
        for layer in (n.removesuffix(".lora_A.weight") for n in tensors if ".lora_A." in n):
            down, up = tensors[f"{layer}.lora_A.weight"], tensors[f"{layer}.lora_B.weight"]
            theirs = self._dotted(layer.removeprefix(KOHYA))
            layers = self._layers(theirs) or (layer,)
            up = swapped(up) if theirs in self.swaps else up
            for part, (a, b) in zip(layers, self._separate(down, up, layers), strict=True):
                if len(layers) > 1 and not a.any():
                    continue
                renamed[f"{part}.lora_A.weight"] = a
                renamed[f"{part}.lora_B.weight"] = b
                renamed[f"{part}.alpha"] = tensors[f"{layer}.alpha"] * len(a) / len(down)
        return renamed

    @cached_property
    def _block(self) -> re.Pattern[str]:
        """A layer in a block: its list, what separates the parts of its name, number, layer."""
        return re.compile(rf"({'|'.join(map(re.escape, self.blocks))})([._])(\d+)\2(.+)")

    @cached_property
    def _theirs_of(self) -> dict[tuple[str, str], str]:
        """(List of blocks here, layer in it) → the layer there, `{}` for the number."""
        return {
            (ours, layer): f"{theirs}.{{}}.{name}"
            for theirs, (ours, table) in self.blocks.items()
            for name, layers in table.items()
            for layer in layers
        }

    def _layers(self, theirs: str) -> tuple[str, ...]:
        """The layers here that one of the authors' layers holds, or none when it is unknown."""
        match = self._block.fullmatch(theirs)
        if match is None:
            return (self.outside[theirs],) if theirs in self.outside else ()
        ours, table = self.blocks[match[1]]
        return tuple(f"{ours}.{match[3]}.{layer}" for layer in table.get(match[4], ()))

    def _theirs(self, layer: str) -> str:
        """The authors' layer that holds one of the layers here."""
        for theirs, ours in self.outside.items():
            if layer == ours:
                return theirs
        blocks, number, rest = layer.split(".", 2)
        return self._theirs_of[blocks, rest].format(number)

    def _dotted(self, name: str) -> str:
        """`double_blocks_0_img_attn_qkv` → `double_blocks.0.img_attn.qkv`; unknown names stay."""
        match = self._block.fullmatch(name)
        table = self.outside if match is None else self.blocks[match[1]][1]
        rest = name if match is None else match[4]
        known = next((layer for layer in table if layer.replace(".", "_") == rest), rest)
        return known if match is None else f"{match[1]}.{match[3]}.{known}"

    def _shares(self, layers: Sequence[str]) -> list[int]:
        """How the rows of one of the authors' layers are shared out."""
        if len(layers) == 1:
            return [1]
        heights = self.heights.items()
        return [next((h for end, h in heights if layer.endswith(end)), 1) for layer in layers]

    def _split(self, rows: torch.Tensor, layers: Sequence[str]) -> list[torch.Tensor]:
        """A tensor (rows, …) of one of the authors' layers → that of each layer here."""
        shares = self._shares(layers)
        unit, rest = divmod(len(rows), sum(shares))
        if rest:
            raise RuntimeError(f"{len(rows)} rows cannot be those of {', '.join(layers)}")
        return list(rows.split([unit * share for share in shares]))

    def _separate(
        self, down: torch.Tensor, up: torch.Tensor, layers: Sequence[str]
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """The A and B of one of the authors' layers → those of each layer here."""
        rows = self._split(up, layers)
        rank, rest = divmod(len(down), len(layers))
        edges = list(pairwise(accumulate([rank] * len(layers), initial=0)))
        parts = list(zip(edges, rows, strict=True))
        if rest or any(b[:, :i].any() or b[:, j:].any() for (i, j), b in parts):
            return [(down, b.contiguous()) for b in rows]
        return [(down[i:j].contiguous(), b[:, i:j].contiguous()) for (i, j), b in parts]
