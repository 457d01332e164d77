"""Write Stability AI's ModelSpec fields, which other tools read, into the headers of weight files.

Every field is derived from the provenance in the same header. There is no date and no folder name,
so equal trainings give equal bytes. https://github.com/Stability-AI/ModelSpec
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
    """Write a safetensors file with ModelSpec fields. Raises: see `files.write_tensors`.

    Args:
        notes: the text entries of the header; ModelSpec fields among them are kept.
    """
    return write_tensors(path, tensors, {**model_spec(tensors, notes), **notes})


def model_spec(names: Iterable[str], notes: Mapping[str, str]) -> dict[str, str]:
    """The ModelSpec fields of a file; empty if its provenance lacks what they need.

    Args:
        names: of the tensors.
        notes: the text entries of the header.
    """
    provenance: dict[str, Any] = json.loads(notes.get(PROVENANCE_KEY, "{}"))
    if not provenance.keys() >= _NEEDED or provenance["family"] not in family_names():
        return {}
    family, trained = find_family(provenance["family"]), provenance["trained"]
    adapters = [_ADAPTER.search(name) is not None for name in names]
    method = (provenance.get("lora") or {}).get("method", "lora")
    # ModelSpec's architecture ends in "/lora" for an adapter, and in nothing for a whole model.
    if all(adapters):
        kind, what = f"/{method}", adapter_text(provenance["lora"])
    else:
        kind = "" if trained == [family.denoiser] else f"/{'+'.join(trained)}"
        what = "trained in full"
        if any(adapters):
            what = f"{adapter_text(provenance['lora'])}, and weights trained in full,"
    size, step = provenance.get("size"), provenance.get("step")
    architecture = provenance["architecture"] + kind
    fields = {
        "sai_model_spec": _VERSION,
        "architecture": architecture,
        "implementation": _implementation(provenance, family),
        "title": f"{architecture} {provenance['identity'][:12]}",
        "description": f"{', '.join(trained)} of {family.name}: {what}; "
        + f"{provenance['samples']} samples"
        + (f", step {step}" if step is not None else "")
        + f"; diffsynth-dagster {provenance['version']}",
        **({} if size is None else {"resolution": f"{size[0]}x{size[1]}"}),
    }
    return {START + name: text for name, text in fields.items()}


def _implementation(provenance: Mapping[str, Any], family: Family) -> str:
    """The code whose tensor names the file uses: "diffusers", or the authors' repository."""
    name = provenance.get("format")
    parts = (family.part(n).lora for n in provenance["trained"])
    rules = next((r for r in parts if r is not None), None)
    # Formats without names of their own keep diffusers' names.
    if name is None or rules is None or names_in(name, rules) is None:
        return _OF_DIFFUSERS
    return family.authors
