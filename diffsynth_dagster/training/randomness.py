"""The global random number generators of a process, as part of the state of a training."""

import random
from collections.abc import Mapping
from typing import Any, cast

import numpy as np
import torch


def random_state(device: torch.device) -> dict[str, Any]:
    """The states of this process's generators: of Python, numpy, torch, and torch on a GPU."""
    kind, keys, *rest = cast(tuple[Any, ...], np.random.get_state(legacy=True))
    return {
        "python": random.getstate(),
        # As a list: a state holds tensors and plain values only, see `packing`.
        "numpy": (kind, keys.tolist(), *rest),
        "torch": torch.get_rng_state(),
        "gpu": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
    }


def set_random_state(state: Mapping[str, Any], device: torch.device) -> None:
    """Restore the states that `random_state` returned."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if device.type == "cuda" and state["gpu"] is not None:
        torch.cuda.set_rng_state(state["gpu"], device)
