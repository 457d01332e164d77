"""PyTorch state dicts, read without running code that a file may hold."""

import zipfile
from pathlib import Path
from typing import Any

import torch

from diffsynth_dagster.errors import WeightsError


def read_torch_file(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a PyTorch state dict, memory-mapped; nothing but tensors is unpickled.

    Raises:
        WeightsError: it holds something else than tensors, or is damaged.
    """
    try:
        # Only the zip format can be memory-mapped; the older one is read.
        mapped = zipfile.is_zipfile(path)
        loaded: Any = torch.load(path, map_location="cpu", mmap=mapped, weights_only=True)
    except Exception as error:
        raise WeightsError(
            "the file is no PyTorch state dict, or holds more than tensors",
            where=str(path),
            do="get the safetensors form of the model",
        ) from error
    if isinstance(loaded, dict) and isinstance(loaded.get("state_dict"), dict):
        loaded = loaded["state_dict"]
    if not isinstance(loaded, dict) or not all(
        isinstance(name, str) and isinstance(value, torch.Tensor) for name, value in loaded.items()
    ):
        raise WeightsError(
            "the file holds more than tensors", where=str(path), do="get the safetensors form"
        )
    return loaded
