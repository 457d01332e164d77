"""Files of what takes the place of a plain LoRA (DoRA, LoKr, OFT), read to go on from.

Names are those of peft and diffusers (`lora_A`, `lora_B`, `lora_magnitude_vector`, `oft_R`) and of
LyCORIS (`lokr_w1`, `lokr_w2_a`, …), behind the names of the module's layers.
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
"""How names start in peft's own files."""
_NAME = re.compile(
    r"(?P<layer>.+)\.(?P<kind>lora_A|lora_B|lora_magnitude_vector|lokr_\w+|oft_R|alpha)"
    r"(?:\.default)?(?:\.weight)?"
)
_AS_WEIGHTS = ("lora_A", "lora_B", "oft_R")
_METHOD_OF = {"lora_magnitude_vector": "dora", "oft_R": "oft", "lora_A": "lora", "lora_B": "lora"}
_SCALE = ("rank", "alpha", "method")
"""What a file says of itself beside the settings of its method."""


@dataclass(frozen=True)
class AdapterFile:
    """What a file holds.

    Attributes:
        method: "lora", "dora", "lokr" or "oft".
        tensors: `<layer>.<name>` → tensor, named as in checkpoints.
        scale: layer → s; see `training.adapters`.
        said: the settings that its header names.
    """

    method: str
    tensors: Tensors
    scale: Mapping[str, float]
    said: Mapping[str, Any]


def read_adapter(path: Path, family: Family, name: str, parameter: str) -> AdapterFile:
    """Read a checkpoint or an export of such a training, or another tool's file by these names.

    Args:
        name: the component or part that it is for.
        parameter: that named the file, for messages.

    Raises:
        WeightsError: the file is missing or damaged, or holds something else.
    """
    where = require_lora(path, parameter)
    folder = rules_for(family, family.part(name).of).folder
    starts = (PEFT_START, *name_starts(family, name))
    tensors, strange = _spelled(read_tensors([path]), starts)
    if strange or not tensors:
        raise WeightsError(
            f"the file holds something else than a DoRA, LoKr or OFT: {some(strange) or 'nothing'}",
            where=where,
            do="give a checkpoint of a training with the same lora_method, or its export",
        )
    methods = {_METHOD_OF.get(_kind(n), "lokr") for n in tensors if not n.endswith(".alpha")}
    if len(methods) > 1 and methods != {"lora", "dora"}:
        raise WeightsError(
            f"the file holds a mixture of {', '.join(sorted(methods))}",
            where=where,
            do="give a checkpoint of a training with the same lora_method, or its export",
        )
    method = "dora" if "dora" in methods else "".join(methods) or "lora"
    notes = read_metadata(path) if path.suffix == ".safetensors" else {}
    try:
        said: dict[str, Any] = json.loads(notes.get(PROVENANCE_KEY, "{}")).get("lora") or {}
        scale = _scales(tensors, method, said, notes, folder)
    except NONSENSE as error:
        raise WeightsError(
            f"what the file says about itself cannot be read: {reason_of(error)}",
            where=where,
            do="give a file with a whole header, or without notes in it",
        ) from error
    own = {n: t for n, t in tensors.items() if not n.endswith(".alpha")}
    return AdapterFile(method, own, scale, said)


def _spelled(tensors: Tensors, starts: tuple[str, ...]) -> tuple[Tensors, list[str]]:
    """Tensors under the names of checkpoints, with `<layer>.alpha`; and the names that are none."""
    spelled: Tensors = {}
    strange: list[str] = []
    for name, tensor in tensors.items():
        match = _NAME.fullmatch(name)
        if match is None:
            strange.append(name)
            continue
        layer, kind = match["layer"], match["kind"]
        layer = layer.removeprefix(next((s for s in starts if layer.startswith(s)), ""))
        spelled[f"{layer}.{kind}" + (".weight" if kind in _AS_WEIGHTS else "")] = tensor
    return spelled, strange


def _kind(name: str) -> str:
    """`lora_A`, `lokr_w1`, … of a tensor as `_spelled` names it."""
    return name.removesuffix(".weight").rpartition(".")[2]


def layer_of(name: str) -> str:
    """The layer of a tensor that is named as in checkpoints."""
    return name.removesuffix(".weight").rpartition(".")[0]


def _scales(
    tensors: Tensors, method: str, said: Mapping[str, Any], notes: Mapping[str, str], folder: str
) -> dict[str, float]:
    """Layer → s.

    For LoKr it is what the header of a checkpoint says for all layers. Else it is LyCORIS's:
    alpha / rank for a layer with a factor that has a rank, where the file gives alpha, and 1.

    Raises:
        the errors of `lora.NONSENSE`.
    """
    layers = {layer_of(name) for name in tensors}
    if method == "oft":
        return dict.fromkeys(layers, 1.0)
    if method != "lokr":
        down = {layer_of(n): t for n, t in tensors.items() if n.endswith(".lora_A.weight")}
        lora = Lora(down, {}, dict.fromkeys(down, 1.0))
        noted, _ = noted_alphas(lora, notes, folder)
        return {n: _own_alpha(tensors, n, noted[n]) / len(a) for n, a in down.items()}
    if "alpha" in said:
        return dict.fromkeys(layers, float(said["alpha"]) / float(said["rank"]))
    scales: dict[str, float] = {}
    for layer in layers:
        factors = (tensors.get(f"{layer}.lokr_{n}") for n in ("w2_b", "w1_b"))
        factor = next((f for f in factors if f is not None), None)
        alpha = tensors.get(f"{layer}.alpha")
        scales[layer] = 1.0 if factor is None or alpha is None else float(alpha) / len(factor)
    return scales


def _own_alpha(tensors: Tensors, layer: str, noted: float) -> float:
    """The alpha of a layer: that in the tensors, else that of the header. Raises: see `_scales`."""
    own = tensors.get(f"{layer}.alpha")
    alpha = float((own is not None and own.item()) or noted)
    if not isfinite(alpha):
        raise ValueError(f"the alpha of '{layer}' is {alpha}")
    return alpha


def require_values(
    file: AdapterFile, settings: Mapping[str, Any], shapes: Mapping[str, Any], where: str
) -> None:
    """Check that a file can start a training.

    Args:
        settings: `TrainingConfig.adapter` of the training.
        shapes: saved name of each of its tensors → shape.

    Raises:
        WeightsError: it is of another method, or has other settings, layers or sizes.
    """
    method = settings["method"]
    if file.method != method:
        raise WeightsError(
            f"the file holds a {file.method}, and lora_method is {method}",
            where=where,
            do="give lora_method as in the training that made the file, or another file",
        )
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
    """Give what is trained in the layers of a module the values of a file that `require_values` has
    checked; values of another scale are brought to that of the training.

    Args:
        parameters: by their saved names.
    """
    scale = settings["alpha"] / settings["rank"] if "alpha" in settings else 1.0
    scaled = ("lora_B", "lokr_w1", "lokr_w1_a")
    with torch.no_grad():
        for name, parameter in parameters.items():
            values = file.tensors[name].to(parameter.device, torch.float32)
            if _kind(name) in scaled:
                values = values * (file.scale[layer_of(name)] / scale)
            parameter.copy_(values)
