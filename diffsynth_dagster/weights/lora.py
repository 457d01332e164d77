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
from diffsynth_dagster.families import each_family
from diffsynth_dagster.families.contract import Family, Tensors
from diffsynth_dagster.families.lora import Lora, LoraRules
from diffsynth_dagster.formats.contract import Unread
from diffsynth_dagster.formats.diffusers import ADAPTER_KEY
from diffsynth_dagster.formats.reading import ReadLora, of_loras, read_all
from diffsynth_dagster.weights.header import PROVENANCE_KEY as PROVENANCE_KEY
from diffsynth_dagster.weights.header import read_metadata
from diffsynth_dagster.weights.load import read_tensors

FOREIGN_PREFIXES = ("diffusion_model.", "model.diffusion_model.", "pipe.")
"""How names of layers start in files of other tools, beside the component's prefix and folder."""

_ADAPTER = re.compile(r"\.(?:lora|lokr|oft)_\w+(?:\.weight)?$")
NONSENSE = (ValueError, TypeError, AttributeError, LookupError, RuntimeError, re.error)
"""What reading JSON, patterns and numbers of another form than expected raises."""


@dataclass(frozen=True)
class LoraFile(Lora):
    """A LoRA by the names of the module's layers.

    Attributes:
        other_family: the family that the header names, where it is not the one that reads it.
        left_out: the components for which the file holds a LoRA as well.
    """

    other_family: str | None = None
    left_out: tuple[str, ...] = ()


def is_in_layer(name: str) -> bool:
    """Whether a tensor of a checkpoint is one that was put into a layer, also by another method than LoRA."""
    return _ADAPTER.search(name) is not None


def require_lora(path: Path, parameter: str) -> str:
    """Where a LoRA file is, for messages. Raises `WeightsError` where it is not there."""
    where = f"{parameter} = {path.absolute()}"
    if not path.is_file():
        raise WeightsError("the LoRA file does not exist", where=where, do="correct the path")
    return where


def name_starts(family: Family, name: str) -> tuple[str, ...]:
    """What may stand before the names of layers in a file for a component or part."""
    owner = family.part(name).of
    folder = rules_for(family, owner).folder
    return (family.prefix(name), family.prefix(owner), f"{folder}.", *FOREIGN_PREFIXES)


def rules_for(family: Family, owner: str) -> LoraRules:
    """How LoRAs of a component are spelled, also of one that no tool loads a LoRA into."""
    component = family.component(owner)
    return component.names.lora or LoraRules(
        component.names.folder, _loads_none, comfyui=component.names.folder, kohya=()
    )


def _loads_none(module: nn.Module, tensors: Tensors, settings: Mapping[str, object]) -> None:
    raise ValueError("no tool loads a LoRA into it")


def loras_in(
    tensors: Tensors,
    notes: Mapping[str, str],
    family: Family,
    names: Sequence[str],
    strict: bool = False,
) -> tuple[dict[str, Lora], str | None]:
    """Component → the LoRA of it in a file, and the family that the header names.

    Args:
        notes: the text entries of the header.
        names: the components and parts that the file is looked into for; that of the first one may
            stand without a start. Those of others that are there are returned as well.
        strict: whether a layer that is in no table of names is refused. Else it stays as it is named.

    Raises:
        Unread: a key is not understood.
        the errors of `NONSENSE`: the notes are of another form, or an alpha is no number.
    """
    prefixes: dict[str, list[str]] = {}
    for name in names:
        owner = family.part(name).of
        parts = [part.name for part in family.parts if part.of == owner]
        prefixes[owner] = [family.prefix(each) for each in (name, owner, *parts)]
    found = read_all(tensors, rules_of_file(family, [*prefixes]), prefixes=prefixes)
    unknown = unknown_in(found) if strict else None
    if unknown is not None:
        raise Unread(unknown)
    made_for: str | None = None
    loras: dict[str, Lora] = {}
    for name, own in found.items():
        alphas, made_for = noted_alphas(own.lora, notes, rules_for(family, name).folder)
        scale = {
            layer: own.lora.scale[layer] if layer in own.alphas else alphas[layer] / len(a)
            for layer, a in own.lora.down.items()
        }
        loras[name] = Lora(own.lora.down, own.lora.up, scale)
    return loras, made_for


def families_of(tensors: Tensors) -> tuple[dict[str, dict[str, ReadLora]], dict[str, str]]:
    """Family → the LoRAs in a file, for those that know each of its keys; and why the others do not.

    Args:
        tensors: those that are no alphas may be on the meta device.
    """
    fitting: dict[str, dict[str, ReadLora]] = {}
    why: dict[str, str] = {}
    for family in each_family():
        try:
            found = read_all(tensors, rules_of_file(family))
        except Unread as error:
            why[family.name] = str(error)
            continue
        unknown = unknown_in(found)
        if unknown is None:
            fitting[family.name] = found
        else:
            why[family.name] = unknown
    return fitting, why


def unknown_in(found: Mapping[str, ReadLora]) -> str | None:
    """What is said of the first key whose layer is in no table of names; None where there is none."""
    unknown = next((own.unknown for own in found.values() if own.unknown), None)
    return None if unknown is None else f"the layer is not known: {unknown}"


def rules_of_file(family: Family, owners: Sequence[str] = ()) -> dict[str, LoraRules]:
    """The rules of some components, or of the denoiser, and of the others that one file can hold a LoRA of as
    well."""
    rules = {owner: rules_for(family, owner) for owner in owners or [family.denoiser]}
    taken = {own.folder for own in rules.values()}
    for component in family.components:
        if component.names.lora is not None and component.names.lora.folder not in taken:
            rules[component.name] = component.names.lora
            taken.add(component.names.lora.folder)
    return rules


def read_lora(path: Path, family: Family, name: str, parameter: str) -> LoraFile:
    """Read a LoRA: a checkpoint of this trainer, an export, or a file of another tool.

    Args:
        name: the component or part that the LoRA is for.
        parameter: that named the file, for messages.

    Raises:
        WeightsError: the file is missing or damaged, or is not understood whole, or holds no LoRA of
            this component.
    """
    where, owner = require_lora(path, parameter), family.part(name).of
    tensors = read_tensors([path])
    notes = read_metadata(path) if path.suffix == ".safetensors" else {}
    if PROVENANCE_KEY in notes:  # a checkpoint may hold weights that were trained in full as well
        own = of_loras(tensors)
        if own and not any(is_in_layer(name) for name in tensors.keys() - own.keys()):
            tensors = own
    try:
        found, made_for = loras_in(tensors, notes, family, [name])
        own = found.pop(owner, None)
        if own is None:
            raise Unread(f"it holds no LoRA of '{name}', but of {', '.join(sorted(found))}")
    except Unread as error:
        raise WeightsError(
            f"the LoRA file cannot be read whole as one of {family.name}: {error}",
            where=where,
            do="give a plain LoRA of this model in the names of any tool (no DoRA, LoHa, LoKr, OFT or "
            "added weights); as lora_checkpoint, a DoRA, LoKr or OFT goes with its lora_method",
        ) from error
    except NONSENSE as error:
        raise WeightsError(
            f"what the file says about its alpha cannot be read: {reason_of(error)}",
            where=where,
            do="give a LoRA with a whole header, or without notes in it",
        ) from error
    other = made_for if made_for != family.name else None
    return LoraFile(own.down, own.up, own.scale, other, tuple(sorted(found)))


def noted_alphas(
    lora: Lora, notes: Mapping[str, str], folder: str
) -> tuple[dict[str, float], str | None]:
    """The alpha of each layer by the header of a file, where its tensors give none, and the family that
    the header names.

    Args:
        notes: the text entries of the header.
        folder: how the names start in peft's settings.

    Raises:
        the errors of `NONSENSE`: the notes are of another form, or an alpha is no number.
    """
    provenance: dict[str, Any] = json.loads(notes.get(PROVENANCE_KEY, "{}"))
    settings: dict[str, Any] = json.loads(notes.get(ADAPTER_KEY, "{}"))
    # A file that says its format has its alphas in the tensors.
    told = provenance.get("lora") if "format" not in provenance else None
    noted = told["alpha"] if told else None
    alphas = {
        layer: float(noted or _adapter_alpha(settings, folder, layer, len(a)) or len(a))
        for layer, a in lora.down.items()
    }
    scales = {layer: lora.scale[layer] for layer in lora.down}
    for layer, value in (*alphas.items(), *scales.items()):
        if not isfinite(value):
            raise ValueError(f"the alpha of '{layer}' is {value}")
    family = provenance.get("family")
    return alphas, None if family is None else str(family)


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


def require_fit(module: nn.Module, lora: Lora, where: str) -> None:
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
    module: nn.Module, lora: Lora, targets: Iterable[str], rank: int, where: str
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
    lora: Lora, what: str, where: str, do: str = "give a LoRA of this model"
) -> WeightsError:
    """The error for a LoRA that does not fit, with the family that its header names, if another."""
    other = lora.other_family if isinstance(lora, LoraFile) else None
    if other is None:
        return WeightsError(what, where=where, do=do)
    return WeightsError(
        f"{what}; its header says that it is a LoRA of the family '{other}'",
        where=where,
        do="give a LoRA of this model",
    )


def fuse_lora(module: nn.Module, lora: Lora, where: str) -> None:
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


def start_lora(module: nn.Module, lora: Lora, scale: float) -> None:
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
