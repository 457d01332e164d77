"""What the header of a weight file says to other tools, in the fields of Stability AI's ModelSpec.

All of it follows from the provenance in the same header, so that equal trainings give equal bytes: there
is no date, and the title is made of the training's identity, not of the name of a folder.
https://github.com/Stability-AI/ModelSpec
"""

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from diffsynth_dagster.config.models import adapter_text
from diffsynth_dagster.families import family_names, find_family
from diffsynth_dagster.families.contract import Family, Tensors
from diffsynth_dagster.files import write_tensors
from diffsynth_dagster.formats.reading import names_in
from diffsynth_dagster.weights.header import PROVENANCE_KEY

START = "modelspec."
IMPLEMENTATION = f"{START}implementation"
_VERSION = "1.0.1"
_NEEDED = {"architecture", "family", "trained", "lora", "identity", "samples", "version"}
_OF_DIFFUSERS = "diffusers"
_ADAPTER = re.compile(r"lora_|lokr_|oft_R|\.alpha$")


def write_described(path: Path, tensors: Tensors, notes: Mapping[str, str]) -> Path:
    """`files.write_tensors`, with the fields of ModelSpec that follow from the notes. Raises as that does.

    Args:
        notes: the text entries of the header; a field of ModelSpec among them stays as it is.
    """
    return write_tensors(path, tensors, {**model_spec(tensors, notes), **notes})


def model_spec(names: Iterable[str], notes: Mapping[str, str]) -> dict[str, str]:
    """The fields of ModelSpec for a file; none where its provenance does not say what they need.

    Args:
        names: of its tensors.
        notes: the text entries of its header.
    """
    said: dict[str, Any] = json.loads(notes.get(PROVENANCE_KEY, "{}"))
    if not said.keys() >= _NEEDED or said["family"] not in family_names():
        return {}
    family = find_family(said["family"])
    adapters = [_ADAPTER.search(name) is not None for name in names]
    method = (said.get("lora") or {}).get("method", "lora")
    if all(adapters):
        kind, what = f"/{method}", adapter_text(said["lora"])
    else:
        alone = said["trained"] == [family.denoiser]
        kind, what = "" if alone else f"/{'+'.join(said['trained'])}", "trained in full"
        what = (
            f"{adapter_text(said['lora'])}, and weights trained in full," if any(adapters) else what
        )
    size, step = said.get("size"), said.get("step")
    fields = {
        "sai_model_spec": _VERSION,
        "architecture": said["architecture"] + kind,
        "implementation": _implementation(said, family),
        "title": f"{said['architecture']}{kind} {said['identity'][:12]}",
        "description": f"{', '.join(said['trained'])} of {family.name}: {what}; {said['samples']} samples"
        + (f", step {step}" if step is not None else "")
        + f"; diffsynth-dagster {said['version']}",
        **({} if size is None else {"resolution": f"{size[0]}x{size[1]}"}),
    }
    return {START + name: text for name, text in fields.items()}


def _implementation(said: Mapping[str, Any], family: Family) -> str:
    """Whose names the tensors have: diffusers', or those of the model's authors."""
    name = said.get("format")
    rules = next((r for r in (family.part(n).lora for n in said["trained"]) if r is not None), None)
    if name is None or rules is None or names_in(name, rules) is None:
        return _OF_DIFFUSERS
    return family.authors
