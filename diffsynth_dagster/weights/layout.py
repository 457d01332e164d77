"""Weights of a module in the layout of the files that it was loaded from, so that they load where those do.

A layout's `convert` gives tensors other names and takes them apart by rows. Which row of which tensor
goes where is found by converting numbers in their place: one for each row.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from diffsynth_dagster.families.contract import Tensors
from diffsynth_dagster.weights.resolved import ComponentFiles


def from_layout_of(files: ComponentFiles, tensors: Tensors) -> Tensors:
    """The other way round: tensors as the files of a component have them → by the module's names. Tensors
    that have these names already stay."""
    places = _places(files)
    if all(name in places for name in tensors):
        return tensors
    named: Tensors = {}
    for name, place in places.items():
        if place.name in tensors:
            whole = tensors[place.name]
            rows = whole.reshape(max(whole.shape[:1], default=1), *whole.shape[1:])[place.rows]
            named[name] = (rows.T if place.turned else rows).reshape(files.shapes[name])
    return named


@dataclass(frozen=True)
class _Rows:
    """Where the rows of a tensor of the module come from: a tensor of the files, and its rows (n,); or, where
    it is turned over, its columns' places there."""

    name: str
    rows: torch.Tensor
    turned: bool = False

    @property
    def is_all(self) -> bool:
        """Whether the rows are 0, 1, 2, …: with as many as the other tensor has, it is that tensor."""
        return not self.turned and torch.equal(self.rows, torch.arange(len(self.rows)))


def in_layout_of(files: ComponentFiles, tensors: Tensors) -> Tensors:
    """Tensors of a component's module as the files have them that it was loaded from: the authors' names, or
    those of diffusers. All of them stay by the module's names where the layout cannot hold them.

    Args:
        tensors: the whole module, or a part of it.
    """
    places = _places(files)
    if not all(name in places for name in tensors):
        return tensors
    pieces: dict[str, list[str]] = {}
    for name in tensors:
        pieces.setdefault(places[name].name, []).append(name)
    written: Tensors = {}
    for theirs, names in pieces.items():
        shape = files.header[theirs].shape
        count = shape[0] if shape else 1
        if sum(len(places[name].rows) for name in names) != count:
            return tensors  # a tensor of the files is trained in part
        if len(names) == 1 and places[names[0]].is_all:
            written[theirs] = tensors[names[0]].reshape(shape)
            continue
        whole = torch.empty((count, *shape[1:]), dtype=tensors[names[0]].dtype)
        for name in names:
            own = tensors[name].T if places[name].turned else tensors[name]
            whole[places[name].rows] = own.reshape(-1, *shape[1:])
        written[theirs] = whole.reshape(shape)
    return written


def _places(files: ComponentFiles) -> Mapping[str, _Rows]:
    """Tensor of the module → where its rows come from, for those whose rows are found."""
    numbers: Tensors = {}
    names: list[str] = []
    starts = [0]
    for name, info in files.header.items():
        count = info.shape[0] if info.shape else 1
        ones = (1,) * max(len(info.shape) - 1, 0)
        numbers[name] = torch.arange(starts[-1], starts[-1] + count).reshape(count, *ones).double()
        names.append(name)
        starts.append(starts[-1] + count)
    bounds = torch.tensor(starts)
    places: dict[str, _Rows] = {}
    for name, tensor in files.component.construction.convert(numbers).items():
        rows = tensor.reshape(-1).long()
        turned = tensor.ndim == 2 and tensor.shape[0] == 1 < len(rows)
        if not len(rows) or (tensor.shape[:1] != rows.shape and not turned):
            continue
        number = int(torch.searchsorted(bounds, rows[0], right=True)) - 1
        inside = (rows >= starts[number]) & (rows < starts[number + 1])
        if bool(inside.all()):
            places[name] = _Rows(names[number], rows - starts[number], turned)
    return places
