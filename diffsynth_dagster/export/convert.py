"""Convert a LoRA file into another format."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffsynth_dagster.errors import OutputError, ParameterError, WeightsError
from diffsynth_dagster.export.run import ROUNDING
from diffsynth_dagster.families import find_family
from diffsynth_dagster.families.contract import Family, Tensors
from diffsynth_dagster.families.lora import Lora
from diffsynth_dagster.files import write_text
from diffsynth_dagster.formats import LoraFormat, find_format, peft
from diffsynth_dagster.formats.change import difference
from diffsynth_dagster.formats.contract import NamedTensors, UnreadableLora
from diffsynth_dagster.formats.diffusers import ADAPTER_KEY
from diffsynth_dagster.weights.header import read_metadata
from diffsynth_dagster.weights.load import read_tensors
from diffsynth_dagster.weights.lora import (
    NONSENSE,
    PROVENANCE_KEY,
    families_of,
    loras_in,
    require_lora,
)
from diffsynth_dagster.weights.model_spec import START, write_described


def convert(file: Path, to: LoraFormat, output: Path | None, family: str | None) -> str:
    """Write a LoRA file in another format; returns a sentence that says what was written.

    Args:
        output: the file to write, or for peft the folder. None: a name beside `file` that ends with
            the format.
        family: the name of the model family. None: it is found in the file.

    Raises:
        WeightsError: the file is missing or damaged, or some of its tensors are not understood.
        ParameterError: the family is not given and cannot be found out.
        OutputError: the output exists, or cannot be written.
    """
    where = require_lora(file, "FILE")
    tensors = read_tensors([file])
    notes = read_metadata(file) if file.suffix == ".safetensors" else {}
    of = _family_of(tensors, notes, family, where)
    try:
        loras, _ = loras_in(tensors, notes, of, [of.denoiser], strict=True)
    except (UnreadableLora, *NONSENSE) as error:
        raise _not_understood(of, str(error), where) from error
    # The main denoiser first: its name may have no prefix in the file.
    loras = dict(sorted(loras.items(), key=lambda item: item[0] != of.denoiser))
    rules = {name: of.lora_rules(name) for name in loras}
    if to == "peft" and len(loras) > 1:
        raise WeightsError(
            f"the file holds LoRAs of {', '.join(loras)}, and a file of peft is for one module",
            where=where,
            do="choose another format",
        )
    try:
        spelled = find_format(to).write(loras, rules)
    except KeyError as error:
        raise _not_understood(of, f"{to} has no name for {error.args[0]}", where) from error
    path = _path(file, to, output)
    _write(path, spelled, to, notes)
    # Read the file back: a format may fold scales or fuse layers, but must not change s B A.
    written = find_format(to).read(read_tensors([path]), rules)
    deviation = max(difference(lora, written[name]) for name, lora in loras.items())
    if deviation > ROUNDING:
        path.unlink()
        raise WeightsError(
            f"the file would change the model differently in {to}: by {deviation:.1e}",
            where=where,
            do="report this with the file",
        )
    return (
        f"wrote {path.absolute()}: {_counted(loras)} of {of.name} in the names of {to}; the change of "
        f"each layer is the same to {deviation:.0e}"
    )


def _write(path: Path, spelled: NamedTensors, to: LoraFormat, notes: Mapping[str, str]) -> None:
    """Write the tensors of a format with a header, and the config that peft needs beside them.

    Args:
        notes: the header of the source file.
    """
    provenance: dict[str, Any] = json.loads(notes.get(PROVENANCE_KEY, "{}"))
    # The header keeps the notes of the source file that are still true of the new one.
    rewritten = (ADAPTER_KEY, PROVENANCE_KEY, "format")
    kept = {k: v for k, v in notes.items() if k not in rewritten}
    if "architecture" in provenance:
        # `write_described` makes the ModelSpec fields again from the provenance.
        kept = {k: v for k, v in kept.items() if not k.startswith(START)}
    origin = {PROVENANCE_KEY: json.dumps({**provenance, "format": to}, sort_keys=True)}
    config = spelled.notes.get(peft.CONFIG)
    more = {k: v for k, v in spelled.notes.items() if k != peft.CONFIG}
    write_described(path, spelled.tensors, {**kept, **more, **origin, "format": "pt"})
    if config is not None:
        write_text(path.parent / peft.CONFIG, config)


def _counted(loras: Mapping[str, Lora]) -> str:
    return ", ".join(f"{len(lora.down)} layers of {name}" for name, lora in loras.items())


def _path(file: Path, to: LoraFormat, output: Path | None) -> Path:
    """The file to write. Raises `OutputError` if it exists, or is not a .safetensors file."""
    if to == "peft":
        # peft loads a folder with a config, not a single file.
        path = (output or file.with_name(f"{file.stem}-peft")) / "adapter_model.safetensors"
    else:
        path = output or file.with_name(f"{file.stem}-{to}.safetensors")
    if path.suffix != ".safetensors":
        raise OutputError(
            "the output is no .safetensors file", where=str(path), do="give it that ending"
        )
    if path.exists():
        raise OutputError(
            "the output exists",
            where=str(path.absolute()),
            do="remove it, or give another --output",
        )
    return path


def _family_of(tensors: Tensors, notes: Mapping[str, str], name: str | None, where: str) -> Family:
    """The family of a file: as asked, as its header says, or the only one that knows all its keys.

    Raises:
        ParameterError: several families know all keys.
        WeightsError: no family does; or the header is nonsense.
    """
    try:
        known = name or json.loads(notes.get(PROVENANCE_KEY, "{}")).get("family")
    except NONSENSE as error:
        raise WeightsError(
            "the header of the file cannot be read", where=where, do="give --family"
        ) from error
    if known is not None:
        return find_family(known)
    fitting, why = families_of(tensors)
    if not fitting:
        raise WeightsError(
            f"the file is not understood whole as a LoRA of any family: {next(iter(why.values()))}",
            where=where,
            do="give --family, for what it does not understand as that",
        )
    if len(fitting) > 1:
        raise ParameterError(
            f"the names in the file are those of {' and '.join(fitting)}",
            where=where,
            do="give --family",
        )
    return find_family(next(iter(fitting)))


def _not_understood(family: Family, why: str, where: str) -> WeightsError:
    return WeightsError(
        f"the LoRA file cannot be read whole as one of {family.name}: {why}",
        where=where,
        do="give a plain LoRA of this model in the names of any tool, or another --family",
    )
