"""What made the training: its recipe, the weights it began with, and the files that it left."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from diffsynth_dagster.config.parameters import TrainingConfig
from diffsynth_dagster.own_names import CHECKPOINT
from diffsynth_dagster.report.words import memory
from diffsynth_dagster.run.record import RunRecord

_METHODS = {"lora": "LoRA", "dora": "DoRA", "lokr": "LoKr", "oft": "OFT"}


@dataclass(frozen=True)
class Saved:
    """A file of a checkpoint.

    Attributes:
        size: as text; None if the file is gone.
        notes: what is special about it: the best, the newest.
    """

    name: str
    digest: str
    size: str | None
    notes: str


def read_recipe(folder: Path) -> dict[str, Any]:
    """The parameters in a run folder's `config.yaml`; empty if it cannot be read."""
    try:
        values = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return values if isinstance(values, dict) else {}


def changed_parameters(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters that differ from their defaults."""
    defaults = TrainingConfig().model_dump(mode="json")
    return {n: v for n, v in recipe.items() if n not in defaults or v != defaults[n]}


def as_yaml(values: Mapping[str, Any]) -> str:
    """Parameters as lines of a recipe."""
    return yaml.safe_dump(dict(values), sort_keys=False, allow_unicode=True) if values else ""


def what_is_trained(record: RunRecord, recipe: Mapping[str, Any]) -> str:
    """What was trained, in a few words: "LoRA of dit, rank 32, alpha 32"."""
    names = ", ".join(record.trained)
    if record.lora is None:
        return f"full training of {names}"
    method = _METHODS.get(str(record.lora.get("method", "lora")), "LoRA")
    sizes = [
        f"{name} {record.lora[name]:g}"
        for name in ("rank", "alpha")
        if isinstance(record.lora.get(name), int | float)
    ]
    in_full = [n for n in record.trained if n in (recipe.get("trainable_models") or [])]
    others = f"; {', '.join(in_full)} in full" if in_full else ""
    adapted = ", ".join(n for n in record.trained if n not in in_full)
    return ", ".join([f"{method} of {adapted}", *sizes]) + others


def checkpoints(folder: Path, record: RunRecord) -> list[Saved]:
    """The files of all checkpoints, the newest first, the best before it."""
    names = [*record.best, *reversed(record.newest), *reversed(record.checkpoints)]
    return [_saved(folder, record, name) for name in dict.fromkeys(names)]


def _saved(folder: Path, record: RunRecord, name: str) -> Saved:
    notes = [
        text
        for text, names in (
            ("smallest held-out loss", record.best),
            ("newest", record.newest),
            ("exports are made of it", record.chosen),
        )
        if name in names
    ]
    try:
        size = memory((folder / name).stat().st_size)
    except OSError:
        size = None
    return Saved(name, record.checkpoints.get(name, ""), size, ", ".join(notes))


def best_saved(record: RunRecord, best_step: int | None) -> str | None:
    """A sentence on a saved checkpoint nearer to the smallest held-out loss than the newest; None
    if there is no better one, or `keep_best` keeps it."""
    if record.best or best_step is None:
        return None
    steps = {name: _step_of(name) for name in record.checkpoints}
    found = [name for name, step in steps.items() if step == best_step]
    if not found or set(found) <= set(record.newest):
        return None
    return f"{', '.join(found)} had the smallest held-out loss (step {best_step:,})."


def _step_of(name: str) -> int | None:
    match = CHECKPOINT.fullmatch(name)
    return int(match["number"]) if match is not None and match["kind"] != "epoch" else None


def made_by(record: RunRecord, recipe: Mapping[str, Any]) -> Sequence[tuple[str, str]]:
    """Facts of the run and its machine: name and text."""
    facts = {
        "family": record.family,
        "trained": what_is_trained(record, recipe),
        "devices": ", ".join(record.devices),
        "mixed precision": record.mixed_precision,
        "resumed after step": ", ".join(f"{step:,}" for step in record.resumed_from),
        "trainer": f"diffsynth-dagster {record.version}",
        **record.libraries,
        "identity": record.identity,
        "samples": record.samples_digest,
    }
    return [(name, text) for name, text in facts.items() if text]
