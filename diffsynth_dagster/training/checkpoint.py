"""Checkpoint files: the trained tensors under the names that users expect, with provenance."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffsynth_dagster.config.parameters import OutputParameters
from diffsynth_dagster.errors import ParameterError
from diffsynth_dagster.families.contract import Family, Tensors
from diffsynth_dagster.families.lora import LoraFormat
from diffsynth_dagster.formats import NamedTensors, find_format
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
        trained: the trained components and parts in it.
        removed: the prefix that is removed from the names of its tensors.
    """

    name: str
    trained: tuple[str, ...]
    removed: str


def checkpoint_files(
    name: str, family: Family, trained: Sequence[str], removed: str
) -> list[CheckpointFile]:
    """The files of a checkpoint: one, or one for each denoiser if several are trained. Denoisers
    have equal layer names, and other tools load a file into each.

    Args:
        name: of the checkpoint, such as `epoch-0`.
        trained: the trained components and parts, in the order of the record.
        removed: `remove_prefix_in_ckpt`. If it is the prefix of one denoiser, the prefix of each
            denoiser is removed from its own file.
    """
    owners = {part: family.part(part).of for part in trained}
    at_work = [
        d.component for d in family.at_work(frozenset(trained)) if d.component in owners.values()
    ]
    # One denoiser, or parts beside it: everything fits into one file.
    if len(at_work) < 2:
        return [CheckpointFile(f"{name}.safetensors", tuple(trained), removed)]
    prefixes = [family.prefix(component) for component in at_work]
    files: list[CheckpointFile] = []
    for component, prefix in zip(at_work, prefixes, strict=True):
        # Trained components that are no denoisers go into the first denoiser's file.
        parts = tuple(
            part
            for part, owner in owners.items()
            if owner == component or (component == at_work[0] and owner not in at_work)
        )
        file_removed = prefix if removed in prefixes else removed
        files.append(CheckpointFile(f"{name}-{component}.safetensors", parts, file_removed))
    return files


def names_in_file(names: Iterable[str], family: Family, file: CheckpointFile) -> dict[str, str]:
    """Name of each trained tensor in a checkpoint file → its full name, as the guide has it:
    `pipe.<component or part>.<tensor>`.

    Args:
        names: of all trained tensors in `TrainingStep`: `components.<component>.<tensor>`.
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
) -> NamedTensors:
    """The content of a checkpoint file: LoRAs in their format, and fully trained weights in the
    layout of the files that they were loaded from.

    Args:
        tensors: by their full names: see `names_in_file`.
        name: the format of LoRAs; None for other adapters and full training.
    """
    family = model.family
    plain: Tensors = {}  # all that no LoRA format writes
    notes: dict[str, str] = {}
    loras: dict[str, Tensors] = {}
    for part in file.trained:
        prefix = family.prefix(part)
        weights = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
        if any(is_in_layer(n) for n in weights):
            if name is not None:
                # The guide's names tell parts apart. Other formats know components only, so the
                # LoRAs of a component's parts are joined.
                owner = part if name == "guide" else family.part(part).of
                loras.setdefault(owner, {}).update(weights)
                continue
        else:
            laid_out = in_layout_of(model.components[family.part(part).of], weights)
            if laid_out.keys() != weights.keys():
                # The files had the authors' names, which the metadata must say.
                notes[IMPLEMENTATION] = family.authors
            weights = laid_out
        plain |= {(prefix + n).removeprefix(file.removed): t for n, t in weights.items()}
    if name is None or not loras:
        return NamedTensors(plain, notes)
    assert record.lora is not None
    # All LoRAs of a training have one scale.
    scale = record.lora["alpha"] / record.lora["rank"]
    prefixes = {part: family.prefix(part).removeprefix(file.removed) for part in loras}
    written = (Guide(prefixes) if name == "guide" else find_format(name)).write(
        {part: lora_of(weights, scale) for part, weights in loras.items()},
        {part: family.lora_rules(part) for part in loras},
    )
    return NamedTensors({**plain, **written.tensors}, {**notes, **written.notes})


def check_prefix(prefix: str, family: Family, trained: frozenset[str]) -> None:
    """Check that the prefix to remove belongs to a trained component.

    The default prefix may match nothing; then nothing is removed.

    Args:
        trained: names of the trained components and parts.

    Raises:
        ParameterError: no trained tensor starts with it.
    """
    default = OutputParameters.model_fields["remove_prefix_in_ckpt"].default
    prefixes = sorted(family.prefix(name) for name in trained)
    if not prefix or prefix == default or any(prefix.startswith(known) for known in prefixes):
        return
    raise ParameterError(
        f"no trained tensor starts with '{prefix}'",
        where="remove_prefix_in_ckpt",
        do=f"give the prefix of a trained model: {', '.join(prefixes)}",
    )


def write_checkpoint(path: Path, content: NamedTensors, provenance: Mapping[str, Any]) -> Path:
    """Write a safetensors file atomically, with its provenance as JSON in the header.

    Equal tensors and provenance give equal bytes.

    Raises:
        OutputError: the folder cannot be written.
    """
    # transformers refuses files without "format".
    notes = {PROVENANCE_KEY: json.dumps(provenance, sort_keys=True), "format": "pt"}
    return write_described(path, content.tensors, {**content.notes, **notes})
