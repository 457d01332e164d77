"""Read the files of DoRA, LoKr and OFT adapters, to continue a training from them.

A tensor is called `<layer>.<name>`. The name is the one that peft and diffusers use (`lora_A`,
`lora_B`, `lora_magnitude_vector`, `oft_R`) or LyCORIS (`lokr_w1`, `lokr_w2_a`, …).
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any

import torch
from torch import nn

from diffsynth_dagster.errors import WeightsError, reason_of, shown
from diffsynth_dagster.families.contract import Family, Tensors
from diffsynth_dagster.families.lora import Lora
from diffsynth_dagster.weights.header import read_metadata
from diffsynth_dagster.weights.load import read_tensors
from diffsynth_dagster.weights.lora import (
    NONSENSE,
    PROVENANCE_KEY,
    name_starts,
    noted_alphas,
    require_lora,
    rules_for,
    some,
)

PEFT_START = "base_model.model."
"""peft puts this before every name in the files that it writes."""
# peft adds its adapter's name, "default", and the name of the parameter, "weight".
_NAME = re.compile(
    r"(?P<layer>.+)\.(?P<kind>lora_A|lora_B|lora_magnitude_vector|lokr_\w+|oft_R|alpha)"
    r"(?:\.default)?(?:\.weight)?"
)
_AS_WEIGHTS = ("lora_A", "lora_B", "oft_R")
_METHOD_OF = {"lora_magnitude_vector": "dora", "oft_R": "oft", "lora_A": "lora", "lora_B": "lora"}
_SCALE = ("rank", "alpha", "method")
"""Entries of the header that need not agree with the training: a scale is converted, and the method
and the shapes are compared by themselves."""


@dataclass(frozen=True)
class AdapterFile:
    """The content of an adapter file.

    Attributes:
        method: "lora", "dora", "lokr" or "oft".
        tensors: `<layer>.<name>` → tensor, named as in checkpoints.
        scale: layer → the factor s of its update; see `training.adapters`.
        said: the adapter settings in its header; empty for other tools' files.
    """

    method: str
    tensors: Tensors
    scale: Mapping[str, float]
    said: Mapping[str, Any]


def read_adapter(path: Path, family: Family, name: str, parameter: str) -> AdapterFile:
    """Read an adapter from a checkpoint or an export of this trainer, or from another tool's file.

    Args:
        name: the component or part that the adapter is for.
        parameter: the parameter that names the file, for messages.

    Raises:
        WeightsError: the file is missing or damaged, or holds other tensors as well.
    """
    where = require_lora(path, parameter)
    folder = rules_for(family, family.part(name).of).folder
    starts = (PEFT_START, *name_starts(family, name))
    tensors, strange = _rename(read_tensors([path]), starts)
    if strange or not tensors:
        raise WeightsError(
            f"the file holds something else than a DoRA, LoKr or OFT: {some(strange) or 'nothing'}",
            where=where,
            do="give a checkpoint of a training with the same lora_method, or its export",
        )
    methods = {_METHOD_OF.get(_kind(n), "lokr") for n in tensors if not n.endswith(".alpha")}
    # A DoRA has the two matrices of a LoRA, and a magnitude.
    if len(methods) > 1 and methods != {"lora", "dora"}:
        raise WeightsError(
            f"the file holds a mixture of {', '.join(sorted(methods))}",
            where=where,
            do="give a checkpoint of a training with the same lora_method, or its export",
        )
    method = "dora" if "dora" in methods else "".join(methods) or "lora"
    notes = read_metadata(path) if path.suffix == ".safetensors" else {}
    try:
        settings: dict[str, Any] = json.loads(notes.get(PROVENANCE_KEY, "{}")).get("lora") or {}
        scale = _scales(tensors, method, settings, notes, folder)
    except NONSENSE as error:
        raise WeightsError(
            f"what the file says about itself cannot be read: {reason_of(error)}",
            where=where,
            do="give a file with a whole header, or without notes in it",
        ) from error
    factors = {n: t for n, t in tensors.items() if not n.endswith(".alpha")}
    return AdapterFile(method, factors, scale, settings)


def _rename(tensors: Tensors, starts: tuple[str, ...]) -> tuple[Tensors, list[str]]:
    """Give tensors the names that checkpoints use; an alpha is called `<layer>.alpha`.

    Args:
        starts: prefixes that are removed; the first that matches.

    Returns:
        The renamed tensors, and the names that are not an adapter's.
    """
    renamed: Tensors = {}
    strange: list[str] = []
    for name, tensor in tensors.items():
        match = _NAME.fullmatch(name)
        if match is None:
            strange.append(name)
            continue
        layer, kind = match["layer"], match["kind"]
        layer = layer.removeprefix(next((s for s in starts if layer.startswith(s)), ""))
        renamed[f"{layer}.{kind}" + (".weight" if kind in _AS_WEIGHTS else "")] = tensor
    return renamed, strange


def _kind(name: str) -> str:
    """`lora_A`, `lokr_w1`, …: the last part of a name from `_rename`."""
    return name.removesuffix(".weight").rpartition(".")[2]


def layer_of(name: str) -> str:
    """The layer that a tensor belongs to, from its name in a checkpoint."""
    return name.removesuffix(".weight").rpartition(".")[0]


def _scales(
    tensors: Tensors,
    method: str,
    settings: Mapping[str, Any],
    notes: Mapping[str, str],
    folder: str,
) -> dict[str, float]:
    """Layer → the factor s of its update.

    LoRA and DoRA: alpha / rank. LoKr: alpha / rank from the header of our checkpoints, for all
    layers; in other tools' files, LyCORIS's rule: alpha / rank for a layer that has a low-rank
    factor and an alpha, else 1. OFT: 1.

    Args:
        settings: the adapter settings in the header.
        notes: all text entries of the header.
        folder: how names start in peft's settings.

    Raises:
        the errors of `lora.NONSENSE`.
    """
    layers = {layer_of(name) for name in tensors}
    # A rotation has no scale.
    if method == "oft":
        return dict.fromkeys(layers, 1.0)
    if method != "lokr":
        down = {layer_of(n): t for n, t in tensors.items() if n.endswith(".lora_A.weight")}
        lora = Lora(down, {}, dict.fromkeys(down, 1.0))
        noted, _ = noted_alphas(lora, notes, folder)
        return {n: _alpha(tensors, n, noted[n]) / len(a) for n, a in down.items()}
    if "alpha" in settings:
        return dict.fromkeys(layers, float(settings["alpha"]) / float(settings["rank"]))
    scales: dict[str, float] = {}
    for layer in layers:
        factors = (tensors.get(f"{layer}.lokr_{n}") for n in ("w2_b", "w1_b"))
        factor = next((f for f in factors if f is not None), None)
        # Without a low-rank factor, LyCORIS ignores alpha.
        alpha = tensors.get(f"{layer}.alpha")
        scales[layer] = 1.0 if factor is None or alpha is None else float(alpha) / len(factor)
    return scales


def _alpha(tensors: Tensors, layer: str, noted: float) -> float:
    """The alpha of a layer, from the tensors or else from the header. Raises: see `_scales`."""
    stored = tensors.get(f"{layer}.alpha")
    alpha = float((stored is not None and stored.item()) or noted)
    if not isfinite(alpha):
        raise ValueError(f"the alpha of '{layer}' is {alpha}")
    return alpha


def require_values(
    file: AdapterFile, settings: Mapping[str, Any], shapes: Mapping[str, Any], where: str
) -> None:
    """Check that a training can start from an adapter file.

    Args:
        settings: `TrainingConfig.adapter` of the training.
        shapes: the training's trained tensors: name in checkpoints → shape.

    Raises:
        WeightsError: the file has another method, or other settings, layers or shapes.
    """
    method = settings["method"]
    if file.method != method:
        raise WeightsError(
            f"the file holds a {file.method}, and lora_method is {method}",
            where=where,
            do="give lora_method as in the training that made the file, or another file",
        )
    # The tensors do not show whether the rotation is exact or from a Neumann series.
    if method == "oft" and not file.said:
        raise WeightsError(
            "the file does not say how its rotations are computed",
            where=where,
            do="give a checkpoint of this trainer, or its export",
        )
    for name in sorted(file.said.keys() & settings.keys() - {*_SCALE}):
        if file.said[name] != settings[name]:
            raise WeightsError(
                f"the file was made with {name} = {shown(file.said[name])}, not "
                f"{shown(settings[name])}",
                where=where,
                do="give lora_method's settings as in the training that made the file",
            )
    for what, names in (
        ("lacks", sorted(shapes.keys() - file.tensors.keys())),
        ("has besides", sorted(file.tensors.keys() - shapes.keys())),
    ):
        if names:
            raise WeightsError(
                f"the file {what} {some(names)}",
                where=where,
                do="give lora_target_modules, lora_rank and lora_method's settings as in the "
                "training that made it",
            )
    for name, shape in shapes.items():
        if tuple(file.tensors[name].shape) != shape:
            raise WeightsError(
                f"{name} is {tuple(file.tensors[name].shape)} in the file, not {shape}",
                where=where,
                do="give lora_rank and lora_method's settings as in the training that made it",
            )


def start_adapter(
    parameters: Mapping[str, nn.Parameter], file: AdapterFile, settings: Mapping[str, Any]
) -> None:
    """Copy the values of an adapter file, checked by `require_values`, into the trained parameters.

    Where the file's scale differs from the training's, values are multiplied by the quotient.

    Args:
        parameters: name in checkpoints → trained parameter.
        settings: `TrainingConfig.adapter` of the training.
    """
    scale = settings["alpha"] / settings["rank"] if "alpha" in settings else 1.0
    scaled = ("lora_B", "lokr_w1", "lokr_w1_a")  # one factor of each product
    with torch.no_grad():
        for name, parameter in parameters.items():
            # In float32, so that scaling does not round twice.
            values = file.tensors[name].to(parameter.device, torch.float32)
            if _kind(name) in scaled:
                values = values * (file.scale[layer_of(name)] / scale)
            parameter.copy_(values)
