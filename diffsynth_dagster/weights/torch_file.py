"""Read PyTorch state dicts without running code from the file."""

import zipfile
from pathlib import Path
from typing import Any

import torch

from diffsynth_dagster.errors import WeightsError


def read_torch_file(path: Path) -> dict[str, torch.Tensor]:
    """Read the tensors of a PyTorch state dict, memory-mapped if possible.

    Raises:
        WeightsError: the file is damaged, or contains something else than tensors.
    """
    try:
        # Only the zip format (since PyTorch 1.6) can be memory-mapped.
        mapped = zipfile.is_zipfile(path)
        loaded: Any = torch.load(path, map_location="cpu", mmap=mapped, weights_only=True)
    except Exception as error:
        raise WeightsError(
            "the file is no PyTorch state dict, or holds more than tensors",
            where=str(path),
            do="get the safetensors form of the model",
        ) from error
    # Lightning checkpoints have the weights under "state_dict".
    if isinstance(loaded, dict) and isinstance(loaded.get("state_dict"), dict):
        loaded = loaded["state_dict"]
    if not isinstance(loaded, dict) or not all(
        isinstance(name, str) and isinstance(value, torch.Tensor) for name, value in loaded.items()
    ):
        raise WeightsError(
            "the file holds more than tensors", where=str(path), do="get the safetensors form"
        )
    return loaded
