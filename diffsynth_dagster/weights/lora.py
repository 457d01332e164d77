"""Read LoRA files of this and other tools, start a training from one, or fuse one.

A LoRA replaces W by W + (alpha / rank) B A (Hu et al. 2021, arXiv:2106.09685), where A is `lora_A`,
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
from diffsynth_dagster.formats.contract import UnreadableLora
from diffsynth_dagster.formats.diffusers import ADAPTER_KEY
from diffsynth_dagster.formats.reading import ReadLora, of_loras, read_all
from diffsynth_dagster.weights.header import PROVENANCE_KEY as PROVENANCE_KEY
from diffsynth_dagster.weights.header import read_metadata
from diffsynth_dagster.weights.load import read_tensors

# ComfyUI's, the one of original checkpoints, and the guide's.
FOREIGN_PREFIXES = ("diffusion_model.", "model.diffusion_model.", "pipe.")
"""Prefixes of layer names in files of other tools, besides the component's own."""

_ADAPTER = re.compile(r"\.(?:lora|lokr|oft)_\w+(?:\.weight)?$")
NONSENSE = (ValueError, TypeError, AttributeError, LookupError, RuntimeError, re.error)
"""The errors from reading header entries (JSON, patterns, numbers) that are malformed."""


@dataclass(frozen=True)
class LoraFile(Lora):
    """A LoRA from a file, by the names of the module's layers.

    Attributes:
        other_family: the family that the header names, if it is not the family that read the file.
        left_out: other components that the file has a LoRA of; it is not used.
    """

    other_family: str | None = None
    left_out: tuple[str, ...] = ()


def is_in_layer(name: str) -> bool:
    """Whether a tensor of a checkpoint belongs to an adapter in a layer: a LoRA, LoKr or OFT."""
    return _ADAPTER.search(name) is not None


def require_lora(path: Path, parameter: str) -> str:
    """Check that a LoRA file exists; returns the `where` for messages. Raises `WeightsError`."""
    where = f"{parameter} = {path.absolute()}"
    if not path.is_file():
        raise WeightsError("the LoRA file does not exist", where=where, do="correct the path")
    return where


def name_starts(family: Family, name: str) -> tuple[str, ...]:
    """The prefixes that layer names may have in a file for a component or part."""
    owner = family.part(name).of
    folder = rules_for(family, owner).folder
    return (family.prefix(name), family.prefix(owner), f"{folder}.", *FOREIGN_PREFIXES)


def rules_for(family: Family, owner: str) -> LoraRules:
    """The names of a component's LoRA in files."""
    component = family.component(owner)
    # A component without rules can be trained, but other tools do not load LoRAs into it.
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
    """Read every LoRA in the tensors of a file.

    Args:
        notes: the text entries of the header.
        names: components and parts that the file may be for. Layers of the first one may have no
            prefix. LoRAs of other components are returned too.
        strict: refuse a layer that is in no table of names, instead of keeping its name.

    Returns:
        Component → its LoRA, and the family that the header names.

    Raises:
        UnreadableLora: a key is not understood.
        the errors of `NONSENSE`: the notes are malformed, or an alpha is not a number.
    """
    prefixes: dict[str, list[str]] = {}
    for name in names:
        owner = family.part(name).of
        parts = [part.name for part in family.parts if part.of == owner]
        prefixes[owner] = [family.prefix(n) for n in (name, owner, *parts)]
    found = read_all(tensors, rules_of_file(family, [*prefixes]), prefixes=prefixes)
    unknown = unknown_in(found) if strict else None
    if unknown is not None:
        raise UnreadableLora(unknown)
    made_for: str | None = None
    loras: dict[str, Lora] = {}
    for name, read in found.items():
        alphas, made_for = noted_alphas(read.lora, notes, rules_for(family, name).folder)
        # An alpha in the tensors takes precedence over the header's.
        scale = {
            layer: read.lora.scale[layer] if layer in read.alphas else alphas[layer] / len(a)
            for layer, a in read.lora.down.items()
        }
        loras[name] = Lora(read.lora.down, read.lora.up, scale)
    return loras, made_for


def families_of(tensors: Tensors) -> tuple[dict[str, dict[str, ReadLora]], dict[str, str]]:
    """Try to read a LoRA file as each family.

    Args:
        tensors: only alphas need values; the others may be on the meta device.

    Returns:
        Family → component → LoRA, for families that know every key; and family → the reason why
        not, for the others.
    """
    fitting: dict[str, dict[str, ReadLora]] = {}
    why: dict[str, str] = {}
    for family in each_family():
        try:
            found = read_all(tensors, rules_of_file(family))
        except UnreadableLora as error:
            why[family.name] = str(error)
            continue
        unknown = unknown_in(found)
        if unknown is None:
            fitting[family.name] = found
        else:
            why[family.name] = unknown
    return fitting, why


def unknown_in(found: Mapping[str, ReadLora]) -> str | None:
    """A message about the first key whose layer is in no table of names; None if all are known."""
    unknown = next((read.unknown for read in found.values() if read.unknown), None)
    return None if unknown is None else f"the layer is not known: {unknown}"


def rules_of_file(family: Family, owners: Sequence[str] = ()) -> dict[str, LoraRules]:
    """Component → LoRA rules, for the components that one file can have LoRAs of.

    Args:
        owners: components that come first; the denoiser if empty.
    """
    rules = {owner: rules_for(family, owner) for owner in owners or [family.denoiser]}
    # Two components of one folder (experts) have the same keys, so a file can be for one only.
    taken = {rule.folder for rule in rules.values()}
    for component in family.components:
        if component.names.lora is not None and component.names.lora.folder not in taken:
            rules[component.name] = component.names.lora
            taken.add(component.names.lora.folder)
    return rules


def read_lora(path: Path, family: Family, name: str, parameter: str) -> LoraFile:
    """Read a LoRA from a checkpoint or an export of this trainer, or from another tool's file.

    Args:
        name: the component or part that the LoRA is for.
        parameter: the parameter that names the file, for messages.

    Raises:
        WeightsError: the file is missing or damaged, has a key that is not understood, or has no
            LoRA of this component.
    """
    where, owner = require_lora(path, parameter), family.part(name).of
    tensors = read_tensors([path])
    notes = read_metadata(path) if path.suffix == ".safetensors" else {}
    # A checkpoint of ours may have fully trained weights as well, which are left out here. But if
    # there are tensors of a DoRA, LoKr or OFT, the file is refused below.
    if PROVENANCE_KEY in notes:
        factors = of_loras(tensors)
        if factors and not any(is_in_layer(name) for name in tensors.keys() - factors.keys()):
            tensors = factors
    try:
        found, made_for = loras_in(tensors, notes, family, [name])
        lora = found.pop(owner, None)
        if lora is None:
            raise UnreadableLora(f"it holds no LoRA of '{name}', but of {', '.join(sorted(found))}")
    except UnreadableLora as error:
        raise WeightsError(
            f"the LoRA file cannot be read whole as one of {family.name}: {error}",
            where=where,
            do="give a plain LoRA of this model in the names of any tool (no DoRA, LoHa, LoKr, OFT "
            "or added weights); as lora_checkpoint, a DoRA, LoKr or OFT goes with its lora_method",
        ) from error
    except NONSENSE as error:
        raise WeightsError(
            f"what the file says about its alpha cannot be read: {reason_of(error)}",
            where=where,
            do="give a LoRA with a whole header, or without notes in it",
        ) from error
    other = made_for if made_for != family.name else None
    return LoraFile(lora.down, lora.up, lora.scale, other, tuple(sorted(found)))


def noted_alphas(
    lora: Lora, notes: Mapping[str, str], folder: str
) -> tuple[dict[str, float], str | None]:
    """Read the alpha of each layer, and the family, from a file's header.

    Args:
        notes: the text entries of the header.
        folder: how layer names start in peft's settings.

    Returns:
        Layer → alpha: our own entry, else peft's, else the rank (a scale of 1). And the family that
        the header names, if it does.

    Raises:
        the errors of `NONSENSE`: the notes are malformed, or an alpha is not a number.
    """
    provenance: dict[str, Any] = json.loads(notes.get(PROVENANCE_KEY, "{}"))
    settings: dict[str, Any] = json.loads(notes.get(ADAPTER_KEY, "{}"))
    # Exports name their format, and have their alphas in the tensors or in peft's settings.
    entry = provenance.get("lora") if "format" not in provenance else None
    noted = entry["alpha"] if entry else None
    alphas = {
        layer: float(noted or _adapter_alpha(settings, folder, layer, len(a)) or len(a))
        for layer, a in lora.down.items()
    }
    scales = {layer: lora.scale[layer] for layer in lora.down}
    # JSON allows NaN and Infinity, which would make every weight NaN.
    for layer, value in (*alphas.items(), *scales.items()):
        if not isfinite(value):
            raise ValueError(f"the alpha of '{layer}' is {value}")
    family = provenance.get("family")
    return alphas, None if family is None else str(family)


def _adapter_alpha(settings: Mapping[str, Any], folder: str, layer: str, rank: int) -> float | None:
    """The alpha of a layer in peft's settings, for a scale of alpha / rank; None without one."""
    own = {
        k.removeprefix(f"{folder}."): v for k, v in settings.items() if k.startswith(f"{folder}.")
    }
    alpha = own.get("lora_alpha")
    for name, value in (own.get("alpha_pattern") or {}).items():
        # peft's keys are regular expressions that match the end of a name.
        if re.fullmatch(rf"(?:.*\.)?(?:{name})", layer):
            alpha = value
            break
    if alpha is None:
        return None
    # rsLoRA's scale is alpha / sqrt(rank).
    return float(alpha) * (rank**0.5 if own.get("use_rslora") else 1.0)


def require_fit(module: nn.Module, lora: Lora, where: str) -> None:
    """Check that a module has the layers of a LoRA, with the same sizes.

    Args:
        module: may be on the meta device.

    Raises:
        WeightsError: a layer is missing or has another size.
    """
    layers = dict(module.named_modules())
    strange = sorted(name for name in lora.down if not hasattr(layers.get(name), "weight"))
    if strange:
        raise _unfit(
            lora, f"the LoRA is for layers that the model lacks: {some(strange)}", where=where
        )
    for name, a in lora.down.items():
        weight: Any = layers[name].weight
        # numel: the weight of a convolution has more dimensions than (out, in).
        size = (len(lora.up[name]), a[0].numel())
        if size != (len(weight), weight[0].numel()):
            what = f"the LoRA of '{name}' is for {size}, not for {tuple(weight.shape)}"
            raise _unfit(lora, what, where=where)


def require_start(
    module: nn.Module, lora: Lora, targets: Iterable[str], rank: int, where: str
) -> None:
    """Check that a training can start from a LoRA: same layers, same rank.

    Args:
        targets: the layers that get a LoRA in the training.
        rank: of the training's LoRA.

    Raises:
        WeightsError: see `require_fit`; or the layers or the rank are different.
    """
    require_fit(module, lora, where)
    layers = set(targets)
    for what, names in (
        ("lacks", sorted(layers - lora.down.keys())),
        ("has besides", sorted(lora.down.keys() - layers)),
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
    """The first three names as text, and how many more there are."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if names[3:] else "")


def _unfit(
    lora: Lora, what: str, where: str, do: str = "give a LoRA of this model"
) -> WeightsError:
    """The error for a LoRA that does not fit; it mentions another family in the file's header."""
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
            # In float32: a bfloat16 product would lose most of a small update.
            update = b.flatten(1).float() @ a.flatten(1).float() * lora.scale[name]
            fused = weight.float() + update.view(weight.shape).to(weight.device)
            weight.copy_(fused.to(weight.dtype))


def start_lora(module: nn.Module, lora: Lora, scale: float) -> None:
    """Copy a LoRA, checked by `require_start`, into the LoRA layers of a module.

    Args:
        scale: alpha / rank of the module's LoRA. B is multiplied by (the file's scale / this one),
            so that the update of the weights is the file's.
    """
    values = {f"{n}.lora_A.weight": t for n, t in lora.down.items()}
    values |= {f"{n}.lora_B.weight": t * (lora.scale[n] / scale) for n, t in lora.up.items()}
    for name, parameter in module.named_parameters():
        if ".lora_" in name:
            # "default" is peft's name of the adapter; it is not in files.
            value = values[name.replace(".default.weight", ".weight")]
            # Files of other tools may store a 1x1 convolution's factor with two dimensions.
            parameter.data.copy_(value.view(parameter.shape))
