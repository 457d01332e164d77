"""Nested values with tensors in them, such as the state of an optimizer, as JSON and named tensors.

Nothing is pickled: what is read again can be numbers, texts, tensors, and collections of them alone.
"""

from collections.abc import Mapping
from typing import Any, cast

import torch


def pack(value: Any, name: str, tensors: dict[str, torch.Tensor], copy: bool = True) -> Any:
    """A JSON value for a nested one; its tensors are put into `tensors`, in CPU memory.

    Args:
        name: what names of its tensors start with.
        copy: whether they are copied; else they lie there already, and nobody else changes them.

    Raises:
        TypeError: something in it is of another type.
    """
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, torch.Tensor):
        tensors[name] = value.detach().to("cpu", copy=copy).contiguous()
        return {"tensor": name}
    if isinstance(value, Mapping):
        items = cast(Mapping[Any, Any], value).items()
        return {"dict": [[key, pack(item, f"{name}.{key}", tensors, copy)] for key, item in items]}
    if isinstance(value, (list, tuple)):
        kind = "list" if isinstance(value, list) else "tuple"
        items = enumerate(cast(list[Any], value))
        return {kind: [pack(item, f"{name}.{index}", tensors, copy) for index, item in items]}
    raise TypeError(f"{name} is a {type(value).__name__}")


def unpack(packed: Any, tensors: Mapping[str, torch.Tensor]) -> Any:
    """What `pack` was given.

    Raises:
        KeyError, ValueError, TypeError: it is damaged.
    """
    if not isinstance(packed, dict):
        return packed
    ((kind, content),) = cast(dict[str, Any], packed).items()
    if kind == "tensor":
        return tensors[content]
    if kind == "dict":
        return {key: unpack(item, tensors) for key, item in content}
    collection = {"list": list, "tuple": tuple}[kind]
    return collection(unpack(item, tensors) for item in content)
