"""Reading LoRA files of any format for comparisons."""

from pathlib import Path

from safetensors.torch import load_file

from diffsynth_dagster.families import find_family
from diffsynth_dagster.families.contract import Tensors
from diffsynth_dagster.formats.names import with_dots
from diffsynth_dagster.formats.reading import of_loras
from diffsynth_dagster.weights.lora import read_lora


def by_module(path: Path, family: str, name: str = "dit") -> Tensors:
    """The tensors of a checkpoint by the module's names: A and B of a LoRA of any format; the
    tensors of another file as they are."""
    tensors = load_file(path)
    # A full checkpoint, not a LoRA.
    if of_loras(tensors).keys() != tensors.keys():
        return tensors
    return with_dots("", read_lora(path, find_family(family), name, "the test"), alphas=False)
