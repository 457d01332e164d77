"""What to do with the trained weights: which file is for which tool, and the lines that load it."""

import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from diffsynth_dagster.errors import ParameterError, WeightsError
from diffsynth_dagster.families import find_family
from diffsynth_dagster.families.contract import Family
from diffsynth_dagster.families.lora import LoraRules
from diffsynth_dagster.run.record import RunRecord
from diffsynth_dagster.weights.header import PROVENANCE_KEY, read_metadata

_EXPORTED = "pytorch_lora_weights.safetensors"
_AFTER = "Into the pipeline of the base model, with what the export wrote:"


@dataclass(frozen=True)
class Use:
    """How the weights are used in one tool.

    Attributes:
        code: lines to run or to paste; empty if words are enough.
    """

    tool: str
    text: str
    code: str = ""


@dataclass(frozen=True)
class Usage:
    """How the weights are used.

    Attributes:
        chosen: the files of the checkpoint to use.
        card: whether the model card, which names every exported file, is there.
    """

    chosen: Sequence[str]
    uses: Sequence[Use] = field(default_factory=list[Use])
    card: bool = False


def usage_of(folder: Path, record: RunRecord, exports: Sequence[str] | None) -> Usage | None:
    """How the weights of a training are used; None without a checkpoint.

    Args:
        exports: the formats that are exported; None for the family's.
    """
    chosen = record.chosen
    if not chosen:
        return None
    card = (folder / "exports" / "README.md").is_file()
    try:
        family = find_family(record.family)
    except ParameterError:  # a family of another version
        return Usage(chosen, [], card)
    native = _format_of(folder / chosen[0])
    if record.lora is None or native is None:
        return Usage(chosen, _others(family, record), card)
    uses = _lora(family, record, folder, native)
    if exports is not None and "diffusers" not in exports:
        files = [folder / name for name in chosen]
        text = "Convert, and load the result with load_lora_weights:"
        uses[0] = Use("diffusers", text, _converted(files, "diffusers"))
    return Usage(chosen, uses, card)


def _format_of(path: Path) -> str | None:
    """The format of the LoRAs in a checkpoint, as its header says; None if it has none or is
    gone."""
    try:
        facts = json.loads(read_metadata(path).get(PROVENANCE_KEY, "{}"))
    except (WeightsError, OSError, ValueError):
        return None
    return facts.get("format") if isinstance(facts, dict) else None


def _lora(family: Family, record: RunRecord, folder: Path, native: str) -> list[Use]:
    """Uses of a LoRA.

    Args:
        native: the format of the checkpoint.
    """
    files = [folder / name for name in record.chosen]
    with_lora = [name for name in record.trained if family.part(name).lora is not None]
    rules = family.lora_rules(with_lora[0])
    uses = [Use("diffusers", _AFTER, "\n".join(_pipeline_lines(family, with_lora, folder)))]
    uses.append(_comfyui(files, rules, native))
    if native in rules.read_by_guide:
        owners = dict.fromkeys(family.part(name).of for name in with_lora)
        lines = [
            f'pipe.load_lora(pipe.{owner}, "{file}", alpha=1)'
            for owner, file in zip(owners, files, strict=False)
        ]
        uses.append(Use("DiffSynth-Studio", "Into the module that was trained:", "\n".join(lines)))
    return [*uses, Use("other tools", "Such as kohya’s scripts:", _converted(files, "kohya"))]


def _comfyui(files: Sequence[Path], rules: LoraRules, native: str) -> Use:
    names = " and ".join(file.name for file in files)
    node = "and put the node “Load LoRA” behind the model"
    if native in rules.read_by_comfyui:
        return Use("ComfyUI", f"Copy {names} into models/loras, {node}.")
    text = f"It does not read {native}, the format of {names}: convert, copy the result into "
    convert = _converted(files, rules.read_by_comfyui[0])
    return Use("ComfyUI", f"{text} models/loras, {node}:", convert)


def _pipeline_lines(family: Family, names: Sequence[str], folder: Path) -> list[str]:
    """The lines that load exported LoRAs into a pipeline of diffusers."""
    owners = list(dict.fromkeys(family.part(name).of for name in names))
    prefixes = [family.lora_rules(owner).folder for owner in owners]
    exports = folder / "exports" / "diffusers"
    if len(set(prefixes)) == len(prefixes):
        # One file for all of them.
        second = _second(family, owners[0]) if len(owners) == 1 else ""
        return [f'pipe.load_lora_weights("{exports / _EXPORTED}"{second})']
    return [
        f'pipe.load_lora_weights("{exports / family.component(owner).names.folder / _EXPORTED}"'
        f"{_second(family, owner)})"
        for owner in owners
    ]


def _second(family: Family, owner: str) -> str:
    """The argument that loads a LoRA into the second of two experts, whose layers have equal
    names."""
    place = family.component(owner).names.folder
    return "" if family.lora_rules(owner).folder == place else f", load_into_{place}=True"


def _converted(files: Sequence[Path], name: str) -> str:
    command = "python -m diffsynth_dagster.export"
    return "\n".join(f"{command} {shlex.quote(str(file))} --to {name}" for file in files)


def _others(family: Family, record: RunRecord) -> list[Use]:
    """Uses of weights that were trained in full, or by another method than LoRA."""
    if record.lora is not None:
        return [Use("diffusers, peft", "exports/README.md says how the export is loaded.")]
    owners = dict.fromkeys(family.part(name).of for name in record.trained)
    folders = [f"exports/diffusers/{family.component(owner).names.folder}" for owner in owners]
    verb = "takes" if len(folders) == 1 else "take"
    return [
        Use(
            "diffusers",
            f"After the export, {' and '.join(folders)} {verb} the place of the folder of the same "
            "name in the base model; exports/README.md has the line that loads it.",
        ),
        Use(
            "ComfyUI, DiffSynth-Studio",
            "Where the original was a file in the authors’ names, exports/authors has one like it.",
        ),
    ]
