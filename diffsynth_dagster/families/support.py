"""What more than one family needs to declare itself."""

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn


def count_blocks(names: Iterable[str], prefix: str) -> int:
    """How many numbered blocks stand under a prefix such as `transformer_blocks.`."""
    depth = prefix.count(".")
    return len({name.split(".")[depth] for name in names if name.startswith(prefix)})


def from_config(kind: Any, config: Mapping[str, Any]) -> nn.Module:
    """A diffusers module from its config.json, without the notes that diffusers left in it."""
    module = kind.from_config({k: v for k, v in config.items() if not k.startswith("_")})
    assert isinstance(module, nn.Module)
    return module
