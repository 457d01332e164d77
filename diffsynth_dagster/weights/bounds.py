"""Bounds of what a configuration may build, told from the tensors of the files."""

import re
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from diffsynth_dagster.families.contract import Shapes

LARGEST_SETTING = 2**24
"""No size and no count in the configuration of a model is larger, such as that of a vocabulary."""
_COUNTS = re.compile(
    r"(^|_)(num|n|size|dims?|layers?|channels?|heads?|depths?|blocks?|width|window|experts?|positions?"
    r"|embeddings?|vocab|patch|groups?|rank|length)(_|$)"
)
# Published models take 2 calls for each tensor.
_CALLS, _CALLS_EACH = 10_000, 20
_LARGEST_TABLES = 2**28
"""Elements of all that a module computes beside its parameters, such as tables of positions."""


class ModelBounds(TorchDispatchMode):
    """Counts what is computed while a module is built, and ends it beyond what the files can need.

    Building a module takes some calls for each tensor of the files (to make it, to fill it), and
    some more for tables that no file holds. Only the tables take memory when the module is built in
    earnest.
    """

    def __init__(self, shapes: Shapes) -> None:
        super().__init__()
        self._calls = _CALLS + _CALLS_EACH * len(shapes)
        self._elements = _LARGEST_TABLES

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run an operation. Raises `ValueError` when it is beyond the bounds."""
        result = func(*args, **(kwargs or {}))
        self._calls -= 1
        # Parameters are made empty, and filled in place.
        is_computed = not (func.is_view or func._schema.is_mutable or "empty" in func.name())
        if is_computed and isinstance(result, torch.Tensor):
            self._elements -= result.numel()
        if min(self._calls, self._elements) < 0:
            raise ValueError("its settings make a model much larger than the files")
        return result


def too_large(settings: object, name: str = "") -> str | None:
    """The name of a size or a count, in settings or within, that no model has; None where there is
    none.

    Args:
        settings: values of JSON, of this name.
    """
    if isinstance(settings, Mapping):
        named = [(str(key), value) for key, value in cast(Mapping[Any, Any], settings).items()]
    elif isinstance(settings, list):
        named = [(name, value) for value in cast(list[Any], settings)]
    else:
        is_count = isinstance(settings, int) and _COUNTS.search(name) is not None
        return name if is_count and abs(cast(int, settings)) > LARGEST_SETTING else None
    return next((found for key, value in named if (found := too_large(value, key))), None)
