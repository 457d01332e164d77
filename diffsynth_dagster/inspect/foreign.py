"""Recognise the weight file of another tool: its family, its format, and its rank.

Names and shapes of the tensors are enough. Only the alphas are read.
"""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open

from diffsynth_dagster.families import each_family, find_family
from diffsynth_dagster.families.contract import Tensors
from diffsynth_dagster.families.lora import Lora
from diffsynth_dagster.formats import FORMATS
from diffsynth_dagster.formats.contract import AllRules, UnreadableLora
from diffsynth_dagster.formats.reading import of_loras, read_all
from diffsynth_dagster.weights.header import Header
from diffsynth_dagster.weights.lora import families_of, rules_of_file
from diffsynth_dagster.weights.recognise import components_in

# Marks of the names of A, whose first dimension is the rank.
_HALVES = ("lora_A.", "lora_down.", "lora.down.", "lora_linear_layer.down.")
# Marks of names that no plain LoRA has → the method.
_OTHERS = {
    "lora_magnitude_vector": "DoRA",
    "dora_scale": "DoRA",
    "lokr_": "LoKr",
    "oft_": "OFT",
    "hada_": "LoHa",
    "boft_": "BOFT",
}


def recognised(path: Path, header: Header) -> list[tuple[str, str]]:
    """The facts found out about a file, as pairs of a title and a text."""
    others = {kind for mark, kind in _OTHERS.items() if any(mark in name for name in header)}
    if others:
        # These methods have no rules in `formats`, so families are not tried.
        return [
            ("kind", f"{', '.join(sorted(others))}, which other tools name in many ways"),
            *_ranks(header),
        ]
    tensors = _tensors(path, header)
    if not of_loras(tensors):
        return [("kind", "whole weights, or none that this project knows"), *_whole(header)]
    # Several families may have the layers of a file: all of them are listed.
    families, why = families_of(tensors)
    fitting: list[tuple[str, str]] = []
    for name, found in families.items():
        layers = ", ".join(f"{len(own.lora.down)} layers of {n}" for n, own in found.items())
        fitting.append(("could be of", f"{name}: {layers}"))
        fitting += [("alpha", _alphas(own.lora)) for own in found.values() if own.alphas]
        formats = _formats(tensors, rules_of_file(find_family(name)))
        fitting.append(("format", ", ".join(formats) or "a mixture of several"))
    reason = next(iter(why.values()), "")
    return [
        ("kind", "LoRA"),
        *_ranks(header),
        *(fitting or [("family", f"not known, as a LoRA of any: {reason}")]),
    ]


def _tensors(path: Path, header: Header) -> Tensors:
    """The tensors of a file. Only alphas have their values; the others are on the meta device."""
    tensors: Tensors = {n: torch.empty(i.shape, device="meta") for n, i in header.items()}
    alphas = [name for name in header if name.endswith(".alpha")]
    if alphas and path.suffix == ".safetensors":
        with safe_open(path, "pt") as file:
            tensors |= {name: file.get_tensor(name) for name in alphas}
    else:
        # Of a pickled file only the header is read: ones stand in for its alphas.
        tensors |= {name: torch.ones(header[name].shape) for name in alphas}
    return tensors


def _ranks(header: Header) -> list[tuple[str, str]]:
    """The ranks in a file: the first dimension of each A."""
    counted = Counter(
        info.shape[0]
        for name, info in header.items()
        if info.shape and any(half in name for half in _HALVES)
    )
    if not counted:
        return []
    if len(counted) == 1:
        return [("rank", str(next(iter(counted))))]
    return [("rank", ", ".join(f"{rank} ({n} layers)" for rank, n in sorted(counted.items())))]


def _alphas(lora: Lora) -> str:
    """The alphas of a LoRA's layers, with the number of layers if there are several."""
    counted = Counter(lora.alpha(layer) for layer in lora.down)
    return ", ".join(
        f"{alpha:g}" + (f" ({n} layers)" if len(counted) > 1 else "")
        for alpha, n in sorted(counted.items())
    )


def _formats(tensors: Tensors, rules: AllRules) -> list[str]:
    """The formats whose names fit every tensor of a file."""
    known: list[str] = []
    for name in FORMATS:
        try:
            read_all(tensors, rules, [name])
        except UnreadableLora:
            continue
        known.append(name)
    return known


def _whole(header: Header) -> list[tuple[str, str]]:
    """The families that have components whose weights are all in the file."""
    found: Mapping[str, list[str]] = {
        family.name: [place.component.name for place in components_in(header, family)]
        for family in each_family()
    }
    return [("could be of", f"{n}: {', '.join(parts)}") for n, parts in found.items() if parts]
