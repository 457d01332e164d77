"""The weights of one model from a file, to go on from in a training of all of them."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn

from diffsynth_dagster.errors import WeightsError
from diffsynth_dagster.families.contract import Family, Shapes
from diffsynth_dagster.weights.header import read_header
from diffsynth_dagster.weights.load import read_tensors
from diffsynth_dagster.weights.lora import FOREIGN_PREFIXES, some
from diffsynth_dagster.weights.recognise import converted_shapes

_T = TypeVar("_T")


def require_weights(module: nn.Module, path: Path, family: Family, name: str, where: str) -> None:
    """Check by its header that a file holds the weights of a component or part.

    Args:
        module: the component's, which may be on the meta device.
        where: for messages: the parameter and the file.

    Raises:
        WeightsError: it is missing or damaged, lacks some of the weights, holds others as well, or is
            of a model of other sizes.
    """
    if not path.is_file():
        raise WeightsError("the checkpoint does not exist", where=where, do="correct the path")
    header = _by_module(read_header(path), family, name)
    shapes = converted_shapes(header, family.component(family.part(name).of), where)
    _require_fit(module, shapes, family, name, where)


def _require_fit(module: nn.Module, shapes: Shapes, family: Family, name: str, where: str) -> None:
    there = {n: tuple(tensor.shape) for n, tensor in module.state_dict().items()}
    part = family.part(name)
    lacks = [n for n, _ in module.named_parameters() if part.holds(n) and n not in shapes]
    strange = [n for n in shapes if n not in there]
    wrong = [n for n, shape in shapes.items() if n in there and there[n] != tuple(shape)]
    sizes = [f"{n} is {tuple(shapes[n])}, not {there[n]}" for n in wrong]
    problems: Mapping[str, Sequence[str]] = {
        "lacks": lacks,
        "holds what the model lacks:": strange,
        "is of another size:": sizes,
    }
    said = [f"{what} {some(sorted(names))}" for what, names in problems.items() if names]
    if said:
        is_lora = any(".lora_" in n or ".lokr_" in n or ".oft_" in n for n in strange)
        raise WeightsError(
            f"the file is not the weights of one '{name}': it {'; it '.join(said)}",
            where=where,
            do="give it as lora_checkpoint, and train a LoRA"
            if is_lora
            else "give a checkpoint of a full training of this model alone, or its export",
        )


def load_weights(module: nn.Module, path: Path, family: Family, name: str, where: str) -> None:
    """Give a component or part the weights of a file, in the element types that it has. What the file
    holds of other parts of the component is left out.

    Raises:
        WeightsError: see `require_weights`; or a weight is NaN or infinite.
    """
    tensors = _by_module(read_tensors([path]), family, name)
    given = family.component(family.part(name).of).construction.convert(tensors)
    _require_fit(module, {n: tuple(t.shape) for n, t in given.items()}, family, name, where)
    own, part = module.state_dict(), family.part(name)
    with torch.no_grad():
        for n, tensor in given.items():
            if part.holds(n):
                own[n].copy_(tensor)


def _by_module(held: Mapping[str, _T], family: Family, name: str) -> dict[str, _T]:
    """What a file holds by the names of the component's module or of its authors: that of the
    component where the file is a whole checkpoint; else all of it, without the prefixes that
    checkpoints have."""
    owner = family.component(family.part(name).of)
    for start in owner.recognition.checkpoint_prefixes:
        inside = {n.removeprefix(start): v for n, v in held.items() if n.startswith(start)}
        if any(all(mark in inside for mark in marks) for marks in owner.recognition.signatures):
            return inside
    starts = (family.prefix(name), family.prefix(owner.name), *FOREIGN_PREFIXES)
    return {
        n.removeprefix(next((s for s in starts if n.startswith(s)), "")): v for n, v in held.items()
    }
