"""LoRA files: read in the key formats of this and other tools, put into a LoRA, or fused.

A LoRA replaces W by W + (alpha / rank) B A (Hu et al. 2021, arXiv:2106.09685); A is `lora_A`,
(rank, in features), and B is `lora_B`, (out features, rank).
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any

import torch
from torch import nn

from diffsynth_dagster.errors import WeightsError, reason_of
from diffsynth_dagster.families.contract import Family, Tensors
from diffsynth_dagster.weights.header import read_metadata
from diffsynth_dagster.weights.load import read_tensors

PROVENANCE_KEY = "diffsynth_dagster"
ADAPTER_KEY = "lora_adapter_metadata"
FOREIGN_PREFIXES = ("diffusion_model.", "model.diffusion_model.", "pipe.")
"""How names of layers start in files of other tools, beside the component's prefix and folder."""

_HALF = re.compile(r"(?P<layer>.+)\.lora_(?P<half>A|B|down|up)(?:\.default)?\.weight")
_BEYOND_LORA = re.compile(
    r"\.(?:diff|diff_b|dora_scale|lora_magnitude_vector.*|hada_\w+|lokr_\w+|oft_.*|lora_mid.*"
    r"|lora_[AB](?:\.default)?\.bias)$"
)
_AS_HERE = {"down": "A", "up": "B"}
NONSENSE = (ValueError, TypeError, AttributeError, LookupError, RuntimeError, re.error)
"""What reading JSON, patterns and numbers of another form than expected raises."""


@dataclass(frozen=True)
class LoraFile:
    """A LoRA by the names of the module's layers.

    Attributes:
        down: layer → A (rank, …).
        up: layer → B (…, rank).
        scale: layer → alpha / rank.
        other_family: the family that the header names, where it is not the one that reads it.
    """

    down: Tensors
    up: Tensors
    scale: dict[str, float]
    other_family: str | None = None


def require_lora(path: Path, parameter: str) -> str:
    """Where a LoRA file is, for messages. Raises `WeightsError` where it is not there."""
    where = f"{parameter} = {path.absolute()}"
    if not path.is_file():
        raise WeightsError("the LoRA file does not exist", where=where, do="correct the path")
    return where


def name_starts(family: Family, name: str) -> tuple[str, ...]:
    """What may stand before the names of layers in a file for a component or part."""
    owner = family.part(name).of
    folder = family.component(owner).lora_start
    return (family.prefix(name), family.prefix(owner), f"{folder}.", *FOREIGN_PREFIXES)


def read_lora(path: Path, family: Family, name: str, parameter: str) -> LoraFile:
    """Read a LoRA: a checkpoint of this trainer, an export, or a file of another tool.

    Args:
        name: the component or part that the LoRA is for.
        parameter: that named the file, for messages.

    Raises:
        WeightsError: the file is missing or damaged, or holds no LoRA.
    """
    where, starts = require_lora(path, parameter), name_starts(family, name)
    owner = family.part(name).of
    folder = family.component(owner).lora_start
    tensors = read_tensors([path])
    beyond = next(filter(_BEYOND_LORA.search, tensors), None)
    if beyond is not None:
        raise WeightsError(
            f"the file changes weights in another way than by a plain LoRA: {beyond}",
            where=where,
            do="give a plain LoRA (no DoRA, LoHa, LoKr, OFT or added weights); as lora_checkpoint, a "
            "DoRA, LoKr or OFT goes with its lora_method",
        )
    tensors = usual_spelling(tensors, starts)
    down, up = _half(tensors, "A"), _half(tensors, "B")
    if not down or not _are_halves(down, up):
        raise WeightsError(
            "the file holds no LoRA, or half of one",
            where=where,
            do="give a checkpoint of a LoRA training, or its export",
        )
    notes = read_metadata(path) if path.suffix == ".safetensors" else {}
    try:
        made_for = add_alphas(tensors, down, notes, folder) or family.name
    except NONSENSE as error:
        raise WeightsError(
            f"what the file says about its alpha cannot be read: {reason_of(error)}",
            where=where,
            do="give a LoRA with a whole header, or without notes in it",
        ) from error
    if owner in family.from_authors:
        try:
            tensors = family.from_authors[owner](tensors)
        except RuntimeError as error:
            raise WeightsError(
                f"the LoRA has layers of other sizes than {family.name}: {error}",
                where=where,
                do="give a LoRA of this model",
            ) from error
    down = _half(tensors, "A")
    return LoraFile(
        down,
        _half(tensors, "B"),
        {layer: float(tensors[f"{layer}.alpha"]) / len(a) for layer, a in down.items()},
        made_for if made_for != family.name else None,
    )


def add_alphas(
    tensors: Tensors, down: Tensors, notes: Mapping[str, str], folder: str
) -> str | None:
    """Add the alpha of each layer to the tensors of a LoRA in the usual spelling.

    Args:
        down: layer → A.
        notes: the text entries of the file's header.
        folder: how the names start in peft's settings.

    Returns:
        The family that the notes name, if they do.

    Raises:
        the errors of `NONSENSE`: the notes are of another form, or an alpha is no number.
    """
    provenance: dict[str, Any] = json.loads(notes.get(PROVENANCE_KEY, "{}"))
    settings: dict[str, Any] = json.loads(notes.get(ADAPTER_KEY, "{}"))
    noted = provenance["lora"]["alpha"] if provenance.get("lora") else None
    for layer, a in down.items():
        own = tensors.get(f"{layer}.alpha")
        # As in kohya's scripts, an alpha of 0 counts as none.
        alpha = float(
            (own is not None and own.item())
            or noted
            or _adapter_alpha(settings, folder, layer, len(a))
            or len(a)
        )
        if not isfinite(alpha):
            raise ValueError(f"the alpha of '{layer}' is {alpha}")
        tensors[f"{layer}.alpha"] = torch.tensor(alpha, dtype=torch.float64)
    family = provenance.get("family")
    return None if family is None else str(family)


def usual_spelling(tensors: Tensors, starts: Sequence[str] = ()) -> Tensors:
    """The tensors of a LoRA in any tool's spelling → `<layer>.lora_A.weight`, `.lora_B.weight`, and
    `.alpha` where it is given. Tensors that are not of a LoRA are left out.

    Args:
        starts: prefixes of the layers; the first that a name has is removed.
    """
    spelled: Tensors = {}
    for name, tensor in tensors.items():
        match = _HALF.fullmatch(name)
        if match is None:
            continue
        layer = match["layer"]
        short = layer.removeprefix(next((s for s in starts if layer.startswith(s)), ""))
        spelled[f"{short}.lora_{_AS_HERE.get(match['half'], match['half'])}.weight"] = tensor
        if f"{layer}.alpha" in tensors:
            spelled[f"{short}.alpha"] = tensors[f"{layer}.alpha"]
    return spelled


def _half(tensors: Tensors, half: str) -> Tensors:
    """Layer → A or B, from tensors in the usual spelling."""
    end = f".lora_{half}.weight"
    return {n.removesuffix(end): t for n, t in tensors.items() if n.endswith(end)}


def for_diffusers(
    tensors: Tensors, folder: str, rank: int, alpha: float
) -> tuple[Tensors, dict[str, object]]:
    """A LoRA or DoRA by the names of its module → as diffusers' pipelines load it, and its settings.

    Args:
        folder: of the component in the layout of diffusers.
    """
    settings: dict[str, object] = {
        f"{folder}.r": rank,
        f"{folder}.lora_alpha": alpha,
        f"{folder}.target_modules": sorted({name.rsplit(".lora_", 1)[0] for name in tensors}),
    }
    if any(name.endswith(".lora_magnitude_vector") for name in tensors):
        settings[f"{folder}.use_dora"] = True
    return {f"{folder}.{name}": tensor for name, tensor in tensors.items()}, settings


def _are_halves(down: Tensors, up: Tensors) -> bool:
    """Whether each layer has an A (rank, …) and a B (…, rank) of one rank."""
    return down.keys() == up.keys() and all(
        min(a.ndim, up[n].ndim) > 1 and len(a) == up[n].shape[1] and a.numel() and up[n].numel()
        for n, a in down.items()
    )


def _adapter_alpha(settings: Mapping[str, Any], folder: str, layer: str, rank: int) -> float | None:
    """The alpha of a layer by peft's settings in the header of an export, for a scale of
    alpha / rank; None where there are none."""
    own = {
        k.removeprefix(f"{folder}."): v for k, v in settings.items() if k.startswith(f"{folder}.")
    }
    alpha = own.get("lora_alpha")
    for name, value in (own.get("alpha_pattern") or {}).items():
        # To peft the keys are patterns that match the end of a name.
        if re.fullmatch(rf"(?:.*\.)?(?:{name})", layer):
            alpha = value
            break
    if alpha is None:
        return None
    return float(alpha) * (rank**0.5 if own.get("use_rslora") else 1.0)


def require_fit(module: nn.Module, lora: LoraFile, where: str) -> None:
    """Check that a module (which may be on the meta device) has the layers of a LoRA.

    Raises:
        WeightsError: it is for layers that the module lacks, or for layers of other sizes.
    """
    layers = dict(module.named_modules())
    strange = sorted(name for name in lora.down if not hasattr(layers.get(name), "weight"))
    if strange:
        raise _unfit(
            lora, f"the LoRA is for layers that the model lacks: {some(strange)}", where=where
        )
    for name, a in lora.down.items():
        weight: Any = layers[name].weight
        size = (len(lora.up[name]), a[0].numel())
        if size != (len(weight), weight[0].numel()):
            what = f"the LoRA of '{name}' is for {size}, not for {tuple(weight.shape)}"
            raise _unfit(lora, what, where=where)


def require_start(
    module: nn.Module, lora: LoraFile, targets: Iterable[str], rank: int, where: str
) -> None:
    """Check that a LoRA can start a training, whose LoRA has these layers and this rank.

    Args:
        targets: the layers that get a LoRA.

    Raises:
        WeightsError: see `require_fit`; or it lacks one of the targets, has other layers too, or
            is of another rank.
    """
    require_fit(module, lora, where)
    wanted = set(targets)
    for what, names in (
        ("lacks", sorted(wanted - lora.down.keys())),
        ("has besides", sorted(lora.down.keys() - wanted)),
    ):
        if names:
            do = "give lora_target_modules as in the training that made it"
            raise _unfit(lora, f"the LoRA file {what} {some(names)}", where, do)
    for name, a in lora.down.items():
        if len(a) != rank:
            size = tuple(a.shape)
            raise _unfit(
                lora,
                f"{name}.lora_A.weight is {size} in the file, not {(rank, *size[1:])}",
                where,
                "give lora_rank as in the training that made it",
            )


def some(names: Sequence[str]) -> str:
    """The first three names, and how many more there are."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if names[3:] else "")


def _unfit(
    lora: LoraFile, what: str, where: str, do: str = "give a LoRA of this model"
) -> WeightsError:
    """The error for a LoRA that does not fit, with the family that its header names, if another."""
    if lora.other_family is None:
        return WeightsError(what, where=where, do=do)
    return WeightsError(
        f"{what}; its header says that it is a LoRA of the family '{lora.other_family}'",
        where=where,
        do="give a LoRA of this model",
    )


def fuse_lora(module: nn.Module, lora: LoraFile, where: str) -> None:
    """Add a LoRA to the weights of a module.

    Raises:
        WeightsError: see `require_fit`.
    """
    require_fit(module, lora, where)
    layers = dict(module.named_modules())
    with torch.no_grad():
        for name, a in lora.down.items():
            weight: Any = layers[name].weight
            b = lora.up[name]
            update = b.flatten(1).float() @ a.flatten(1).float() * lora.scale[name]
            fused = weight.float() + update.view(weight.shape).to(weight.device)
            weight.copy_(fused.to(weight.dtype))


def start_lora(module: nn.Module, lora: LoraFile, scale: float) -> None:
    """Give the LoRA layers of a module the values of a file that `require_start` has checked.

    Args:
        scale: alpha / rank of the module's LoRA; values of another scale are brought to it.
    """
    given = {f"{n}.lora_A.weight": t for n, t in lora.down.items()}
    given |= {f"{n}.lora_B.weight": t * (lora.scale[n] / scale) for n, t in lora.up.items()}
    for name, parameter in module.named_parameters():
        if ".lora_" in name:
            values = given[name.replace(".default.weight", ".weight")]
            parameter.data.copy_(values.view(parameter.shape))
