"""How a person loads what was exported."""

import json
from pathlib import Path

from diffsynth_dagster.export.exported import Exported
from diffsynth_dagster.families.contract import Family


def how_to_load(exported: Exported, family: Family, start: Path | None = None) -> str:
    """A line of Python that loads an exported file into `pipe`, a pipeline of diffusers; a comment, where
    the file is for other tools.

    Args:
        start: the folder that the paths in it start at; left out, they are absolute.
    """
    path = exported.path.absolute() if start is None else exported.path.relative_to(start)
    component = family.component(exported.components[0])
    place = f"pipe.{component.names.folder}"
    if exported.format == "authors":
        return f"# {path} has the authors' names: for ComfyUI and DiffSynth-Studio"
    if exported.kind == "full":
        return f'{place} = {_class_of(exported.path.parent)}.from_pretrained("{path.parent}")'
    if exported.format == "peft":
        return f'{place} = peft.PeftModel.from_pretrained({place}, "{path.parent}")'
    # A second denoiser, whose layers have the names of the first one's.
    second = family.lora_rules(component.name).folder != component.names.folder
    return (
        f'pipe.load_lora_weights("{path}"{f", load_into_{component.names.folder}=True" * second})'
    )


def _class_of(folder: Path) -> str:
    """The class that reads a folder, with its library."""
    said = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    name = said.get("_class_name")
    return f"diffusers.{name}" if name else f"transformers.{said['architectures'][0]}"
