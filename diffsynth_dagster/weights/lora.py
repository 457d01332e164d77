"""LoRA files: read in any key format that is exported, put into a LoRA, or fused into a module.

A LoRA replaces W by W + (alpha / rank) B A (Hu et al. 2021, arXiv:2106.09685); A is `lora_A`,
(rank, in features), and B is `lora_B`, (out features, rank).
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from diffsynth_dagster.errors import WeightsError
from diffsynth_dagster.families.contract import Family, Tensors
from diffsynth_dagster.weights.header import read_metadata
from diffsynth_dagster.weights.load import read_tensors

PROVENANCE_KEY = "diffsynth_dagster"
ADAPTER_KEY = "lora_adapter_metadata"
_ENDING = re.compile(r"\.lora_([AB])(?:\.default)?\.weight$")


@dataclass(frozen=True)
class LoraFile:
    """A LoRA by the names of the module's layers.

    Attributes:
        down: layer → A (rank, …).
        up: layer → B (…, rank).
        scale: layer → alpha / rank.
    """

    down: Tensors
    up: Tensors
    scale: dict[str, float]


def read_lora(path: Path, family: Family, name: str, parameter: str) -> LoraFile:
    """Read a LoRA: a checkpoint of this trainer, an export for diffusers, or the family's open
    format.

    Args:
        name: the component or part that the LoRA is for.
        parameter: that named the file, for messages.

    Raises:
        WeightsError: the file is missing or damaged, or holds no LoRA.
    """
    where = f"{parameter} = {path}"
    if not path.is_file():
        raise WeightsError("the LoRA file does not exist", where=where, do="correct the path")
    tensors = read_tensors([path])
    if family.close_lora is not None and any(n.startswith("lora_unet_") for n in tensors):
        tensors = family.close_lora(tensors)
    starts = (family.prefix(name), f"{family.component(family.part(name).of).folder}.", "pipe.")
    down: Tensors = {}
    up: Tensors = {}
    alphas: dict[str, float] = {}
    for key, tensor in tensors.items():
        match = _ENDING.search(key)
        if match is None:
            continue
        whole = key[: match.start()]
        layer = whole.removeprefix(next((s for s in starts if whole.startswith(s)), ""))
        (down if match[1] == "A" else up)[layer] = tensor
        if f"{whole}.alpha" in tensors:
            alphas[layer] = float(tensors[f"{whole}.alpha"])
    if not down or down.keys() != up.keys():
        raise WeightsError(
            "the file holds no LoRA, or half of one",
            where=where,
            do="give a checkpoint of a LoRA training, or its export",
        )
    common = _alpha(path)
    scale = {n: (alphas.get(n) or common or float(len(a))) / len(a) for n, a in down.items()}
    return LoraFile(down, up, scale)


def for_diffusers(
    tensors: Tensors, folder: str, rank: int, alpha: float
) -> tuple[Tensors, dict[str, Any]]:
    """A LoRA by the names of its module → as diffusers' pipelines load it, and its settings.

    Args:
        folder: of the component in the layout of diffusers.
    """
    settings = {
        f"{folder}.r": rank,
        f"{folder}.lora_alpha": alpha,
        f"{folder}.target_modules": sorted({name.rsplit(".lora_", 1)[0] for name in tensors}),
    }
    return {f"{folder}.{name}": tensor for name, tensor in tensors.items()}, settings


def _alpha(path: Path) -> float | None:
    """The alpha of all layers that the header tells."""
    if path.suffix != ".safetensors":
        return None
    notes = read_metadata(path)
    provenance: dict[str, Any] = json.loads(notes.get(PROVENANCE_KEY, "{}"))
    if provenance.get("lora"):
        return float(provenance["lora"]["alpha"])
    adapter: dict[str, Any] = json.loads(notes.get(ADAPTER_KEY, "{}"))
    alphas = [value for key, value in adapter.items() if key.endswith("lora_alpha")]
    return float(alphas[0]) if alphas else None


def fuse_lora(module: nn.Module, lora: LoraFile, where: str) -> None:
    """Add a LoRA to the weights of a module.

    Raises:
        WeightsError: it is for layers that the module lacks, or for layers of other sizes.
    """
    layers = dict(module.named_modules())
    strange = sorted(name for name in lora.down if not hasattr(layers.get(name), "weight"))
    if strange:
        raise WeightsError(
            f"the LoRA is for layers that the model lacks: {', '.join(strange[:3])}",
            where=where,
            do="give a LoRA of this model",
        )
    with torch.no_grad():
        for name, a in lora.down.items():
            weight: Any = layers[name].weight
            b = lora.up[name]
            update = b.flatten(1).float() @ a.flatten(1).float() * lora.scale[name]
            if update.numel() != weight.numel() or len(update) != len(weight):
                raise WeightsError(
                    f"the LoRA of '{name}' is for {tuple(update.shape)}, not for "
                    f"{tuple(weight.shape)}",
                    where=where,
                    do="give a LoRA of this model",
                )
            fused = weight.float() + update.view(weight.shape).to(weight.device)
            weight.copy_(fused.to(weight.dtype))


def start_lora(module: nn.Module, lora: LoraFile, scale: float, where: str) -> None:
    """Give the LoRA layers of a module the values of a file.

    Args:
        scale: alpha / rank of the module's LoRA; values of another scale are brought to it.

    Raises:
        WeightsError: its layers or rank are not those of the module's LoRA.
    """
    parameters = {
        name.replace(".default.weight", ".weight"): p
        for name, p in module.named_parameters()
        if ".lora_" in name
    }
    given = {f"{n}.lora_A.weight": t for n, t in lora.down.items()}
    given |= {f"{n}.lora_B.weight": t * (lora.scale[n] / scale) for n, t in lora.up.items()}
    for what, names in (
        ("lacks", sorted(parameters.keys() - given.keys())),
        ("has besides", sorted(given.keys() - parameters.keys())),
    ):
        if names:
            raise WeightsError(
                f"the LoRA file {what} {', '.join(names[:3])}"
                + (f" and {len(names) - 3} more" if names[3:] else ""),
                where=where,
                do="give lora_target_modules as in the training that made it",
            )
    for name, parameter in parameters.items():
        if parameter.shape != given[name].shape:
            raise WeightsError(
                f"{name} is {tuple(given[name].shape)} in the file, not {tuple(parameter.shape)}",
                where=where,
                do="give lora_rank as in the training that made it",
            )
        parameter.data.copy_(given[name])
