"""Names of layers by a model's authors, where one layer there may hold several layers here.

A table (`AuthorsNames`) says which layers of a module of diffusers stand one above another in one
layer of the authors (Q, K and V in `qkv`). It converts weights, and LoRAs in both directions.
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
    """The halves of a tensor (rows, …) exchanged."""
    return torch.cat(rows.chunk(2)[::-1])


def _numberless(name: str, dot: str) -> str:
    """A name with `*` for its first number."""
    start, number, rest = _first_number(name, dot)
    return name if number is None else f"{start}{dot}*{dot}{rest}"


def _numbered(pattern: str, name: str, dot: str) -> str:
    """A name with the first number of another for its `*`."""
    return pattern.replace("*", _first_number(name, dot)[1] or "")


def _first_number(name: str, dot: str) -> tuple[str, str | None, str]:
    """What stands before, at and after the number of a block."""
    match = re.fullmatch(rf"([a-z_]+?){re.escape(dot)}(\d+){re.escape(dot)}(.+)", name)
    return (name, None, "") if match is None else (match[1], match[2], match[3])


@dataclass(frozen=True)
class AuthorsNames:
    """How the authors of a model name the layers of its denoiser.

    Attributes:
        blocks: numbered list of blocks there → its name here, and layer there → the layers here
            that stand one above another in it. Of several names of a layer the first is written.
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

    def ours(self, name: str) -> tuple[str, ...]:
        """The layers here that a layer holds by the authors' name, or by the name here, as other scripts
        have it; none where it is unknown."""
        layers = self._layers(self._dotted(name))
        if layers:
            return layers
        if "." in name:
            return (name,) if self.theirs(name) is not None else ()
        for pattern in (name, _numberless(name, "_")):
            if pattern in self._own_with_underscores:
                return (_numbered(self._own_with_underscores[pattern], name, "_"),)
        return ()

    def theirs(self, layer: str) -> str | None:
        """The authors' layer that holds one of the layers here."""
        for theirs, ours in self.outside.items():
            if layer == ours:
                return theirs
        known = self._theirs_of.get(_numberless(layer, "."))
        return None if known is None else _numbered(known, layer, ".")

    def to_theirs(self, lora: Lora) -> Lora:
        """A LoRA by diffusers' names → by the authors'.

        Layers that are one layer there become one LoRA with the A of each stacked and the B of each
        on the diagonal; layers without a LoRA have zeros. Its rank is that of all together, and its
        alpha grows with it, so that the product is the same.

        Raises:
            KeyError: a layer has no name there.
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
        """The A and B of several layers as those of one, for the scale of the first that has a LoRA."""
        shares = self._shares(layers)
        no_a, b = torch.zeros_like(lora.down[first]), lora.up[first]
        unit = len(b) // shares[layers.index(first)]
        ups: list[torch.Tensor] = []
        for layer, share in zip(layers, shares, strict=True):
            own = lora.up.get(layer, b.new_zeros(unit * share, b.shape[1]))
            ratio = lora.scale.get(layer, lora.scale[first]) / lora.scale[first]
            ups.append(own if ratio == 1 else own * ratio)
        a = torch.cat([lora.down.get(layer, no_a) for layer in layers])
        return a.contiguous(), torch.block_diag(*ups)

    def to_ours(self, lora: Lora) -> Lora:
        """A LoRA by the authors' names, dotted or as kohya writes them → by diffusers' names.

        A layer of several whose B is not block-diagonal gives each of them the whole A.

        Raises:
            RuntimeError: the heights are not those of the layers that stand one above another.
        """
        down: Tensors = {}
        up: Tensors = {}
        scale: dict[str, float] = {}
        for name, a in lora.down.items():
            layers, b = self.ours(name), lora.up[name]
            b = swapped(b) if self._dotted(name) in self.swaps else b
            parts = self._separate(a, b, layers) if len(layers) > 1 else [(a, b)]
            for layer, (own_a, own_b) in zip(layers, parts, strict=True):
                if len(layers) > 1 and not own_a.any():
                    continue
                down[layer], up[layer], scale[layer] = own_a, own_b, lora.scale[name]
        return Lora(down, up, scale)

    @cached_property
    def _block(self) -> re.Pattern[str]:
        """A layer in a block: its list, what separates the parts of its name, number, layer."""
        return re.compile(rf"({'|'.join(map(re.escape, self.blocks))})([._])(\d+)\2(.+)")

    @cached_property
    def _theirs_of(self) -> dict[str, str]:
        """Layer in a block here → there, each with `*` for the number."""
        return {
            f"{ours}.*.{layer}": f"{theirs}.*.{name}"
            for theirs, (ours, table) in self.blocks.items()
            for name, layers in reversed(list(table.items()))
            for layer in layers
        }

    @cached_property
    def _own_with_underscores(self) -> dict[str, str]:
        """A layer here in kohya's form → with its dots; `*` for the number of a block."""
        named = (*self._theirs_of, *self.outside.values())
        return {name.replace(".", "_"): name for name in named}

    def _layers(self, theirs: str) -> tuple[str, ...]:
        """The layers here that one of the authors' layers holds, or none when it is unknown."""
        match = self._block.fullmatch(theirs)
        if match is None:
            return (self.outside[theirs],) if theirs in self.outside else ()
        ours, table = self.blocks[match[1]]
        return tuple(f"{ours}.{match[3]}.{layer}" for layer in table.get(match[4], ()))

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
            return [(down.clone(), b.contiguous()) for b in rows]
        return [(down[i:j].contiguous(), b[:, i:j].contiguous()) for (i, j), b in parts]
