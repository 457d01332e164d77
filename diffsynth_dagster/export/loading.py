"""The line of Python that loads an exported file."""

import json
from pathlib import Path

from diffsynth_dagster.export.exported import Exported
from diffsynth_dagster.families.contract import Family


def how_to_load(exported: Exported, family: Family, start: Path | None = None) -> str:
    """A line of Python that loads an exported file into `pipe`, a pipeline of diffusers. For a file
    in the authors' layout, a Python comment that names its tools.

    Args:
        start: the folder that the path in the line is relative to. None: the path is absolute.
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
    # The experts of Wan2.2 have equal layer names: diffusers must be told which one it is for.
    second = family.lora_rules(component.name).folder != component.names.folder
    return (
        f'pipe.load_lora_weights("{path}"{f", load_into_{component.names.folder}=True" * second})'
    )


def _class_of(folder: Path) -> str:
    """The class whose `from_pretrained` loads a folder, with its library."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    # Only diffusers writes `_class_name`; transformers writes `architectures`.
    name = config.get("_class_name")
    return f"diffusers.{name}" if name else f"transformers.{config['architectures'][0]}"
