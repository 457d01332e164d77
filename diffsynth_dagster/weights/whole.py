"""Start a full training from the weights of one component in a file."""

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
    """Check, from its header, that a file has the weights of a component or part.

    Args:
        module: the component's module; may be on the meta device.
        name: the component or part.
        where: the parameter and the file, for messages.

    Raises:
        WeightsError: the file is missing or damaged, or its tensors do not fit: some are missing,
            unknown, or of another shape.
    """
    if not path.is_file():
        raise WeightsError("the checkpoint does not exist", where=where, do="correct the path")
    header = _without_prefixes(read_header(path), family, name)
    shapes = converted_shapes(header, family.component(family.part(name).of), where)
    _require_fit(module, shapes, family, name, where)


def _require_fit(module: nn.Module, shapes: Shapes, family: Family, name: str, where: str) -> None:
    """Compare the shapes of a file's tensors with the module's. Raises `WeightsError`."""
    expected = {n: tuple(tensor.shape) for n, tensor in module.state_dict().items()}
    part = family.part(name)
    # Buffers may be missing: some are computed, and not saved.
    missing = [n for n, _ in module.named_parameters() if part.holds(n) and n not in shapes]
    unknown = [n for n in shapes if n not in expected]
    wrong = [n for n, shape in shapes.items() if n in expected and expected[n] != tuple(shape)]
    sizes = [f"{n} is {tuple(shapes[n])}, not {expected[n]}" for n in wrong]
    problems: Mapping[str, Sequence[str]] = {
        "lacks": missing,
        "holds what the model lacks:": unknown,
        "is of another size:": sizes,
    }
    sentences = [f"{what} {some(sorted(names))}" for what, names in problems.items() if names]
    if sentences:
        is_lora = any(".lora_" in n or ".lokr_" in n or ".oft_" in n for n in unknown)
        raise WeightsError(
            f"the file is not the weights of one '{name}': it {'; it '.join(sentences)}",
            where=where,
            do="give it as lora_checkpoint, and train a LoRA"
            if is_lora
            else "give a checkpoint of a full training of this model alone, or its export",
        )


def load_weights(module: nn.Module, path: Path, family: Family, name: str, where: str) -> None:
    """Copy the weights of a file into a component or part, keeping the module's types.

    If `name` is a part, the file's tensors of other parts are ignored.

    Raises:
        WeightsError: see `require_weights`; or a weight is NaN or infinite.
    """
    tensors = _without_prefixes(read_tensors([path]), family, name)
    converted = family.component(family.part(name).of).construction.convert(tensors)
    _require_fit(module, {n: tuple(t.shape) for n, t in converted.items()}, family, name, where)
    weights, part = module.state_dict(), family.part(name)
    with torch.no_grad():
        for n, tensor in converted.items():  # the tensors of `weights` are the module's own
            if part.holds(n):
                weights[n].copy_(tensor)


def _without_prefixes(held: Mapping[str, _T], family: Family, name: str) -> dict[str, _T]:
    """Remove the prefixes of tensor names: the module's or the authors' names are left.

    From a whole checkpoint, only the component's tensors are returned.
    """
    owner = family.component(family.part(name).of)
    for start in owner.recognition.checkpoint_prefixes:
        below = {n.removeprefix(start): v for n, v in held.items() if n.startswith(start)}
        if any(all(mark in below for mark in marks) for marks in owner.recognition.signatures):
            return below
    starts = (family.prefix(name), family.prefix(owner.name), *FOREIGN_PREFIXES)
    return {
        n.removeprefix(next((s for s in starts if n.startswith(s)), "")): v for n, v in held.items()
    }
