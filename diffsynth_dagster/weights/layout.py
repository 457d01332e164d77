"""Convert trained weights back to the layout of the model's files, so that other tools load them.

`construction.convert` renames the tensors of the files and splits them by rows. To invert it, each
row of each tensor is replaced by its number. The converted numbers show where each row goes.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from diffsynth_dagster.families.contract import Tensors
from diffsynth_dagster.weights.resolved import ComponentFiles


def from_layout_of(files: ComponentFiles, tensors: Tensors) -> Tensors:
    """Convert tensors from the layout of a component's files to the module's names and shapes.

    The inverse of `in_layout_of`. Tensors that already have the module's names are not changed.
    """
    sources = _sources(files)
    if all(name in sources for name in tensors):
        return tensors
    converted: Tensors = {}
    for name, source in sources.items():
        if source.name in tensors:
            whole = tensors[source.name]
            # A scalar counts as one row.
            rows = whole.reshape(max(whole.shape[:1], default=1), *whole.shape[1:])[source.rows]
            converted[name] = (rows.T if source.transposed else rows).reshape(files.shapes[name])
    return converted


@dataclass(frozen=True)
class _Source:
    """Where a tensor of the module comes from.

    Attributes:
        name: of the tensor in the files.
        rows: (n,) which of its rows.
        transposed: whether each of these rows is a column of the module's tensor.
    """

    name: str
    rows: torch.Tensor
    transposed: bool = False

    @property
    def is_in_order(self) -> bool:
        """Whether the rows are 0, 1, 2, …"""
        return not self.transposed and torch.equal(self.rows, torch.arange(len(self.rows)))


def in_layout_of(files: ComponentFiles, tensors: Tensors) -> Tensors:
    """Convert tensors of a component's module to the layout of the files that it was loaded from.

    That layout has the authors' names or diffusers' names. If the tensors do not fit into it (a
    part of a fused tensor, for example), all of them are returned by the module's names.

    Args:
        tensors: the whole module, or a part of it.
    """
    sources = _sources(files)
    if not all(name in sources for name in tensors):
        return tensors
    pieces: dict[str, list[str]] = {}  # tensor of the files → tensors of the module made from it
    for name in tensors:
        pieces.setdefault(sources[name].name, []).append(name)
    converted: Tensors = {}
    for file_name, names in pieces.items():
        shape = files.header[file_name].shape
        count = shape[0] if shape else 1
        if sum(len(sources[name].rows) for name in names) != count:
            return tensors  # only a part of this tensor of the files is given
        if len(names) == 1 and sources[names[0]].is_in_order:
            converted[file_name] = tensors[names[0]].reshape(shape)  # no copy
            continue
        whole = torch.empty((count, *shape[1:]), dtype=tensors[names[0]].dtype)
        for name in names:
            rows = tensors[name].T if sources[name].transposed else tensors[name]
            whole[sources[name].rows] = rows.reshape(-1, *shape[1:])
        converted[file_name] = whole.reshape(shape)
    return converted


def _sources(files: ComponentFiles) -> Mapping[str, _Source]:
    """Tensor of the module → where its rows come from.

    A tensor is left out if its rows are mixed from several tensors or cannot be followed.
    """
    numbers: Tensors = {}
    names: list[str] = []
    starts = [0]  # number of the first row of each tensor, and the end
    for name, info in files.header.items():
        count = info.shape[0] if info.shape else 1
        ones = (1,) * max(len(info.shape) - 1, 0)
        # (rows, 1, 1, …): the number of each row. `convert` expects floating-point tensors, and
        # float64 holds all of the numbers exactly.
        numbers[name] = torch.arange(starts[-1], starts[-1] + count).reshape(count, *ones).double()
        names.append(name)
        starts.append(starts[-1] + count)
    bounds = torch.tensor(starts)
    sources: dict[str, _Source] = {}
    for name, tensor in files.component.construction.convert(numbers).items():
        rows = tensor.reshape(-1).long()
        transposed = tensor.ndim == 2 and tensor.shape[0] == 1 < len(rows)  # (1, rows)
        if not len(rows) or (tensor.shape[:1] != rows.shape and not transposed):
            continue
        number = int(torch.searchsorted(bounds, rows[0], right=True)) - 1
        inside = (rows >= starts[number]) & (rows < starts[number + 1])
        if bool(inside.all()):
            sources[name] = _Source(names[number], rows - starts[number], transposed)
    return sources
