"""Names, types and shapes of the tensors in a model file, without reading the tensors."""

import json
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffsynth_dagster.errors import WeightsError

TORCH_SUFFIXES = (".pth", ".pt", ".bin", ".ckpt")
_LARGEST_HEADER = 100_000_000


@dataclass(frozen=True)
class TensorInfo:
    """Element type (as safetensors writes it, `F32`, `BF16`, …) and shape of a tensor."""

    dtype: str
    shape: tuple[int, ...]


Header = dict[str, TensorInfo]


def read_header(path: Path) -> Header:
    """Tensor name → type and shape, for a safetensors file or a PyTorch state dict.

    Raises:
        WeightsError: the file is missing, cut off, or of another format.
    """
    if not path.is_file():
        raise WeightsError(
            "the model file does not exist", where=str(path), do="correct the path or download it"
        )
    if path.suffix in TORCH_SUFFIXES:
        return _torch_header(path)
    if path.suffix != ".safetensors":
        raise WeightsError(
            f"'{path.suffix or path.name}' is no model file format",
            where=str(path),
            do="give a .safetensors file or a PyTorch state dict (.pth, .pt, .bin, .ckpt)",
        )
    raw = _raw_header(path)
    return {
        name: TensorInfo(entry["dtype"], tuple(entry["shape"]))
        for name, entry in raw.items()
        if name != "__metadata__"
    }


def read_metadata(path: Path) -> dict[str, str]:
    """The text entries in the header of a safetensors file."""
    return dict(_raw_header(path).get("__metadata__", {}))


def _raw_header(path: Path) -> dict[str, Any]:
    damaged = WeightsError(
        "the file is not a whole safetensors file",
        where=str(path),
        do="download or copy it again; it may have been cut off",
    )
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        if len(start) < 8:
            raise damaged
        (length,) = struct.unpack("<Q", start)
        if length > min(size - 8, _LARGEST_HEADER):
            raise damaged
        try:
            header: dict[str, Any] = json.loads(file.read(length))
            end = max(
                (e["data_offsets"][1] for n, e in header.items() if n != "__metadata__"), default=0
            )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise damaged from error
    if end != size - 8 - length:
        raise damaged
    return header


def _torch_header(path: Path) -> Header:
    from diffsynth_dagster.weights.torch_file import read_torch_file

    tensors = read_torch_file(path)
    return {
        name: TensorInfo(str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))
        for name, tensor in tensors.items()
    }


def read_headers(paths: Iterable[Path]) -> Header:
    """The headers of the shards of one model, merged.

    Raises:
        WeightsError: see `read_header`; or two shards hold the same tensor.
    """
    merged: Header = {}
    for path in paths:
        header = read_header(path)
        twice = merged.keys() & header.keys()
        if twice:
            raise WeightsError(
                f"the tensor '{min(twice)}' stands in more than one of the files",
                where=str(path),
                do="name the shards of one model only; check the pattern",
            )
        merged.update(header)
    return merged
