"""Turns nested values, such as an optimizer's state, into JSON and named tensors, and back.

Nothing is pickled: reading gives only numbers, texts, tensors, and collections of them.
"""

from collections.abc import Mapping
from typing import Any, cast

import torch


def pack(value: Any, name: str, tensors: dict[str, torch.Tensor], copy: bool = True) -> Any:
    """Turn a nested value into a JSON value. Its tensors are added to `tensors`, in CPU memory.

    Args:
        name: start of the names of its tensors.
        copy: whether to copy tensors that are in CPU memory already. Without a copy, nobody else
            may change them.

    Raises:
        TypeError: the value holds something of another type.
    """
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, torch.Tensor):
        tensors[name] = value.detach().to("cpu", copy=copy).contiguous()
        return {"tensor": name}
    if isinstance(value, Mapping):
        items = cast(Mapping[Any, Any], value).items()
        # As pairs: the keys of an optimizer's state are numbers, which JSON has no keys for.
        return {"dict": [[key, pack(item, f"{name}.{key}", tensors, copy)] for key, item in items]}
    if isinstance(value, (list, tuple)):
        kind = "list" if isinstance(value, list) else "tuple"
        items = enumerate(cast(list[Any], value))
        return {kind: [pack(item, f"{name}.{index}", tensors, copy) for index, item in items]}
    raise TypeError(f"{name} is a {type(value).__name__}")


def unpack(packed: Any, tensors: Mapping[str, torch.Tensor]) -> Any:
    """The value that `pack` was given.

    Raises:
        KeyError, ValueError, TypeError: the JSON value is damaged.
    """
    if not isinstance(packed, dict):
        return packed
    # Each JSON object has one key, which says what it stands for.
    ((kind, content),) = cast(dict[str, Any], packed).items()
    if kind == "tensor":
        return tensors[content]
    if kind == "dict":
        return {key: unpack(item, tensors) for key, item in content}
    collection = {"list": list, "tuple": tuple}[kind]
    return collection(unpack(item, tensors) for item in content)
