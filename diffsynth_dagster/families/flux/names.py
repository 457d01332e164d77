"""FLUX.1's layers by the names of its authors: in their single files, and in LoRAs for other tools.

One table serves both. It says which layers of diffusers' `FluxTransformer2DModel` stand one above
another in one layer there. diffusers' own converters know the same names, but only the widths of
the published model; the tests compare with them at those widths.
"""

import re
from collections.abc import Sequence
from itertools import accumulate, pairwise

import torch

from diffsynth_dagster.families.contract import Tensors

_DOUBLE = {
    "img_mod.lin": ("norm1.linear",),
    "txt_mod.lin": ("norm1_context.linear",),
    "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "img_attn.proj": ("attn.to_out.0",),
    "txt_attn.proj": ("attn.to_add_out",),
    "img_attn.norm.query_norm": ("attn.norm_q",),
    "img_attn.norm.key_norm": ("attn.norm_k",),
    "txt_attn.norm.query_norm": ("attn.norm_added_q",),
    "txt_attn.norm.key_norm": ("attn.norm_added_k",),
    "img_mlp.0": ("ff.net.0.proj",),
    "img_mlp.2": ("ff.net.2",),
    "txt_mlp.0": ("ff_context.net.0.proj",),
    "txt_mlp.2": ("ff_context.net.2",),
}
_SINGLE = {
    "modulation.lin": ("norm.linear",),
    "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
    "linear2": ("proj_out",),
    "norm.query_norm": ("attn.norm_q",),
    "norm.key_norm": ("attn.norm_k",),
}
_OUTSIDE = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "time_in.in_layer": "time_text_embed.timestep_embedder.linear_1",
    "time_in.out_layer": "time_text_embed.timestep_embedder.linear_2",
    "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
    "vector_in.out_layer": "time_text_embed.text_embedder.linear_2",
    "guidance_in.in_layer": "time_text_embed.guidance_embedder.linear_1",
    "guidance_in.out_layer": "time_text_embed.guidance_embedder.linear_2",
    "final_layer.linear": "proj_out",
    "final_layer.adaLN_modulation.1": "norm_out.linear",
}
_LISTS = {
    "double": ("transformer_blocks", _DOUBLE),
    "single": ("single_transformer_blocks", _SINGLE),
}
_SHIFT_FIRST = "final_layer.adaLN_modulation.1"
"""The one layer whose halves (shift, scale) diffusers has the other way round."""

_IN_DOUBLE, _IN_SINGLE = "transformer_blocks.*.", "single_transformer_blocks.*."
LORA_ALIASES = {
    "a_to_qkv": tuple(f"{_IN_DOUBLE}attn.to_{x}" for x in "qkv"),
    "b_to_qkv": tuple(f"{_IN_DOUBLE}attn.add_{x}_proj" for x in "qkv"),
    "ff_a.0": (f"{_IN_DOUBLE}ff.net.0.proj",),
    "ff_a.2": (f"{_IN_DOUBLE}ff.net.2",),
    "ff_b.0": (f"{_IN_DOUBLE}ff_context.net.0.proj",),
    "ff_b.2": (f"{_IN_DOUBLE}ff_context.net.2",),
    "a_to_out": (f"{_IN_DOUBLE}attn.to_out.0",),
    "b_to_out": (f"{_IN_DOUBLE}attn.to_add_out",),
    "proj_out": (f"{_IN_SINGLE}proj_out",),
    "norm.linear": (f"{_IN_SINGLE}norm.linear",),
    "norm1_a.linear": (f"{_IN_DOUBLE}norm1.linear",),
    "norm1_b.linear": (f"{_IN_DOUBLE}norm1_context.linear",),
    "to_qkv_mlp": (*(f"{_IN_SINGLE}attn.to_{x}" for x in "qkv"), f"{_IN_SINGLE}proj_mlp"),
}
"""What users of DiffSynth-Studio call the layers → globs of diffusers' names."""

PREFIX = "model.diffusion_model."
_BLOCK = re.compile(r"(double|single)_blocks([._])(\d+)\2(.+)")
_KOHYA = "lora_unet_"


def _by_kohya(table: dict[str, tuple[str, ...]]) -> dict[str, str]:
    return {name.replace(".", "_"): name for name in table}


_FROM_KOHYA = {kind: _by_kohya(table) for kind, (_, table) in _LISTS.items()}
_OUTSIDE_FROM_KOHYA = {name.replace(".", "_"): name for name in _OUTSIDE}
_ORIGINAL = {
    (list_name, layer): f"{kind}_blocks.{{}}.{name}"
    for kind, (list_name, table) in _LISTS.items()
    for name, layers in table.items()
    for layer in layers
}
_ORIGINAL_OUTSIDE = {layer: name for name, layer in _OUTSIDE.items()}


def _layers(original: str) -> tuple[str, ...]:
    """The layers here that one of the authors' layers holds, or none when it is unknown."""
    match = _BLOCK.fullmatch(original)
    if match is None:
        return (_OUTSIDE[original],) if original in _OUTSIDE else ()
    list_name, table = _LISTS[match[1]]
    return tuple(f"{list_name}.{match[3]}.{layer}" for layer in table.get(match[4], ()))


def _original(layer: str) -> str:
    """The authors' layer that holds one of the layers here."""
    if layer in _ORIGINAL_OUTSIDE:
        return _ORIGINAL_OUTSIDE[layer]
    list_name, number, rest = layer.split(".", 2)
    return _ORIGINAL[list_name, rest].format(number)


def _from_kohya(name: str) -> str:
    """`double_blocks_0_img_attn_qkv` → `double_blocks.0.img_attn.qkv`; unknown names stay."""
    match = _BLOCK.fullmatch(name)
    if match is None:
        return _OUTSIDE_FROM_KOHYA.get(name, name)
    return f"{match[1]}_blocks.{match[3]}.{_FROM_KOHYA[match[1]].get(match[4], match[4])}"


def _shares(layers: Sequence[str]) -> list[int]:
    """How the rows of one of the authors' layers are shared out: the MLP is four times as wide."""
    return [4 if len(layers) > 1 and layer.endswith("proj_mlp") else 1 for layer in layers]


def _split(rows: torch.Tensor, layers: Sequence[str]) -> list[torch.Tensor]:
    """A tensor (rows, …) of one of the authors' layers → that of each layer here."""
    shares = _shares(layers)
    unit, rest = divmod(len(rows), sum(shares))
    if rest:
        raise RuntimeError(f"{len(rows)} rows cannot be those of {', '.join(layers)}")
    return list(rows.split([unit * share for share in shares]))


def _swap(rows: torch.Tensor) -> torch.Tensor:
    """The halves of a tensor (rows, …) exchanged."""
    return torch.cat(rows.chunk(2)[::-1])


def to_diffusers(tensors: Tensors) -> Tensors:
    """The authors' transformer → diffusers' names and tensors. Other names stay as they are."""
    renamed: Tensors = {}
    for name, tensor in tensors.items():
        original, _, kind = name.removeprefix(PREFIX).rpartition(".")
        layers = _layers(original)
        if not layers or original == layers[0]:
            renamed[name.removeprefix(PREFIX)] = tensor
            continue
        if original == _SHIFT_FIRST:
            tensor = _swap(tensor)
        kind = "weight" if kind == "scale" else kind
        parts = [tensor] if len(layers) == 1 else [p.clone() for p in _split(tensor, layers)]
        renamed |= {f"{layer}.{kind}": part for layer, part in zip(layers, parts, strict=True)}
    return renamed


def to_kohya(tensors: Tensors, alpha: float) -> Tensors:
    """A LoRA by diffusers' names → the keys `lora_unet_…` of kohya's scripts and ComfyUI.

    Layers that are one layer there become one LoRA with the A of each stacked and the B of each on
    the diagonal; layers without a LoRA have zeros. Its rank is that of all together, and alpha
    grows with it, so that the product is the same to the bit.

    Args:
        tensors: `<layer>.lora_A.weight` (rank, in) and `<layer>.lora_B.weight` (out, rank).
    """
    down = {n.removesuffix(".lora_A.weight"): t for n, t in tensors.items() if ".lora_A." in n}
    renamed: Tensors = {}
    for original in dict.fromkeys(_original(layer) for layer in down):
        layers = _layers(original)
        shares = _shares(layers)
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
        key = _KOHYA + original.replace(".", "_")
        renamed[f"{key}.lora_down.weight"] = torch.cat(a_of_each).contiguous()
        renamed[f"{key}.lora_up.weight"] = _swap(up) if original == _SHIFT_FIRST else up
        renamed[f"{key}.alpha"] = torch.tensor(alpha * len(layers))
    return renamed


def from_authors(tensors: Tensors) -> Tensors:
    """A LoRA by the authors' names, dotted or as kohya writes them → by diffusers' names.

    A fused layer whose B is not block-diagonal gives each of its layers the whole A. Unknown
    layers keep their names, so that the message about a LoRA that does not fit can show them.

    Args:
        tensors: `<layer>.lora_A.weight` (rank, in), `.lora_B.weight` (out, rank), `.alpha` ().

    Raises:
        RuntimeError: the heights are not those of the fused layers.
    """
    renamed: Tensors = {}
    for layer in (n.removesuffix(".lora_A.weight") for n in tensors if ".lora_A." in n):
        down, up = tensors[f"{layer}.lora_A.weight"], tensors[f"{layer}.lora_B.weight"]
        original = _from_kohya(layer.removeprefix(_KOHYA))
        layers = _layers(original) or (layer,)
        up = _swap(up) if original == _SHIFT_FIRST else up
        for part, (a, b) in zip(layers, _separate(down, up, layers), strict=True):
            if len(layers) > 1 and not a.any():
                continue
            renamed[f"{part}.lora_A.weight"] = a
            renamed[f"{part}.lora_B.weight"] = b
            renamed[f"{part}.alpha"] = tensors[f"{layer}.alpha"] * len(a) / len(down)
    return renamed


def _separate(
    down: torch.Tensor, up: torch.Tensor, layers: Sequence[str]
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """A fused layer's A and B → those of each layer."""
    rows = _split(up, layers)
    rank, rest = divmod(len(down), len(layers))
    edges = list(pairwise(accumulate([rank] * len(layers), initial=0)))
    own = [(down[i:j], b[:, i:j]) for (i, j), b in zip(edges, rows, strict=True)]
    elsewhere = any(b[:, :i].any() or b[:, j:].any() for (i, j), b in zip(edges, rows, strict=True))
    if rest or elsewhere:
        return [(down, b.contiguous()) for b in rows]
    return [(a.contiguous(), b.contiguous()) for a, b in own]
