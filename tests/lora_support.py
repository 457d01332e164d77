"""LoRA files as tests look at them."""

from pathlib import Path

from safetensors.torch import load_file

from diffsynth_dagster.families import find_family
from diffsynth_dagster.families.contract import Tensors
from diffsynth_dagster.formats.names import with_dots
from diffsynth_dagster.formats.reading import of_loras
from diffsynth_dagster.weights.lora import read_lora


def by_module(path: Path, family: str, name: str = "dit") -> Tensors:
    """The tensors of a checkpoint by the names of the module: A and B of a LoRA, in whatever format it is;
    else as the file has them."""
    tensors = load_file(path)
    if of_loras(tensors).keys() != tensors.keys():
        return tensors
    return with_dots("", read_lora(path, find_family(family), name, "the test"), alphas=False)
