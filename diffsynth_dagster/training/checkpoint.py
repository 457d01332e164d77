"""Saved weights: the trained tensors under the names that users expect, with provenance."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffsynth_dagster.config.parameters import OutputParameters
from diffsynth_dagster.errors import ParameterError
from diffsynth_dagster.families.contract import Family, Tensors
from diffsynth_dagster.families.lora import LoraFormat
from diffsynth_dagster.formats import Spelled, find_format
from diffsynth_dagster.formats.guide import Guide
from diffsynth_dagster.formats.names import lora_of
from diffsynth_dagster.run.record import RunRecord
from diffsynth_dagster.training.adapters import saved_name
from diffsynth_dagster.weights.layout import in_layout_of
from diffsynth_dagster.weights.lora import PROVENANCE_KEY, is_in_layer
from diffsynth_dagster.weights.model_spec import IMPLEMENTATION, write_described
from diffsynth_dagster.weights.resolved import ResolvedModel


@dataclass(frozen=True)
class CheckpointFile:
    """A file of a checkpoint.

    Attributes:
        trained: the trained components and parts that it holds.
        removed: the prefix that is removed from the names of its tensors.
    """

    name: str
    trained: tuple[str, ...]
    removed: str


def checkpoint_files(
    name: str, family: Family, trained: Sequence[str], removed: str
) -> list[CheckpointFile]:
    """The files of a checkpoint: one, or one for each denoiser where several are trained. Their
    layers have the same names, and other tools load them one by one.

    Args:
        name: of the checkpoint, such as `epoch-0`.
        trained: the trained components and parts, in the order of the record.
        removed: `remove_prefix_in_ckpt`. That of one denoiser removes those of all, each from its
            own file.
    """
    of = {part: family.part(part).of for part in trained}
    at_work = [
        d.component for d in family.at_work(frozenset(trained)) if d.component in of.values()
    ]
    if len(at_work) < 2:
        return [CheckpointFile(f"{name}.safetensors", tuple(trained), removed)]
    starts = [family.prefix(component) for component in at_work]
    files: list[CheckpointFile] = []
    for component, start in zip(at_work, starts, strict=True):
        # What is trained beside the denoisers goes with the first one.
        own = tuple(
            part
            for part, owner in of.items()
            if owner == component or (component == at_work[0] and owner not in at_work)
        )
        own_removed = start if removed in starts else removed
        files.append(CheckpointFile(f"{name}-{component}.safetensors", own, own_removed))
    return files


def names_in_file(names: Iterable[str], family: Family, file: CheckpointFile) -> dict[str, str]:
    """Names of trained tensors → their whole names, `pipe.<component or part>.<tensor>`, for those that a
    file of a checkpoint holds.

    Args:
        names: in `TrainingStep`: `components.<component>.<tensor>`.
    """
    parts = [family.part(name) for name in file.trained]
    saved: dict[str, str] = {}
    for name in names:
        _, component, rest = name.split(".", 2)
        part = next((p for p in parts if p.of == component and p.holds(rest)), None)
        if part is not None:
            saved[name] = family.prefix(part.name) + saved_name(rest)
    return saved


def content_of(
    tensors: Tensors,
    model: ResolvedModel,
    file: CheckpointFile,
    record: RunRecord,
    name: LoraFormat | None,
) -> Spelled:
    """What a file of a checkpoint holds: LoRAs in their format, and weights that are trained in full as
    the files have them that they came from.

    Args:
        tensors: by their whole names: see `names_in_file`.
        name: the format of LoRAs; None where what is trained in the layers is none.
    """
    family = model.family
    rest: Tensors = {}
    notes: dict[str, str] = {}
    loras: dict[str, Tensors] = {}
    for part in file.trained:
        start = family.prefix(part)
        own = {n.removeprefix(start): t for n, t in tensors.items() if n.startswith(start)}
        if any(is_in_layer(n) for n in own):
            if name is not None:
                # Parts of a component are one LoRA of it, but for the guide's names.
                loras.setdefault(part if name == "guide" else family.part(part).of, {}).update(own)
                continue
        else:
            laid_out = in_layout_of(model.components[family.part(part).of], own)
            if laid_out.keys() != own.keys():
                notes[IMPLEMENTATION] = family.authors
            own = laid_out
        rest |= {(start + n).removeprefix(file.removed): t for n, t in own.items()}
    if name is None or not loras:
        return Spelled(rest, notes)
    assert record.lora is not None
    scale = record.lora["alpha"] / record.lora["rank"]
    starts = {part: family.prefix(part).removeprefix(file.removed) for part in loras}
    written = (Guide(starts) if name == "guide" else find_format(name)).write(
        {part: lora_of(own, scale) for part, own in loras.items()},
        {part: family.lora_rules(part) for part in loras},
    )
    return Spelled({**rest, **written.tensors}, {**notes, **written.notes})


def check_prefix(prefix: str, family: Family, trained: frozenset[str]) -> None:
    """Check before training that the prefix to remove is that of a trained component.

    The default prefix may match nothing: then nothing is removed.

    Args:
        trained: names of the trained components and parts.

    Raises:
        ParameterError: no trained tensor starts with it.
    """
    default = OutputParameters.model_fields["remove_prefix_in_ckpt"].default
    starts = sorted(family.prefix(name) for name in trained)
    if not prefix or prefix == default or any(prefix.startswith(start) for start in starts):
        return
    raise ParameterError(
        f"no trained tensor starts with '{prefix}'",
        where="remove_prefix_in_ckpt",
        do=f"give the prefix of a trained model: {', '.join(starts)}",
    )


def write_checkpoint(path: Path, content: Spelled, provenance: Mapping[str, Any]) -> Path:
    """Write a safetensors file whole, with its provenance as JSON in the header.

    Equal tensors and provenance give equal bytes.

    Raises:
        OutputError: the folder cannot be written.
    """
    notes = {PROVENANCE_KEY: json.dumps(provenance, sort_keys=True), "format": "pt"}
    return write_described(path, content.tensors, {**content.notes, **notes})
