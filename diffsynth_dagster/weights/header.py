"""Names, types and shapes of the tensors in a model file, without reading the tensors."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, TypeGuard, cast

from diffsynth_dagster.errors import WeightsError, is_text, shown

PROVENANCE_KEY = "diffsynth_dagster"
"""Under which the header of a file of this trainer says where the file comes from, as JSON."""
TORCH_SUFFIXES = (".pth", ".pt", ".bin", ".ckpt")
_LARGEST_HEADER = 100_000_000
_LARGEST_SIZE = 2**53
"""Elements of a tensor; more than any file has."""
_BITS = {
    "F4": 4,
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    **dict.fromkeys(("BOOL", "U8", "I8"), 8),
    **dict.fromkeys(
        ("F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"),
        8,
    ),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 16),
    **dict.fromkeys(("I32", "U32", "F32"), 32),
    **dict.fromkeys(("I64", "U64", "F64", "C64"), 64),
}
"""Element type of safetensors → bits of an element."""


@dataclass(frozen=True)
class TensorInfo:
    """Element type (as safetensors writes it, `F32`, `BF16`, …) and shape of a tensor."""

    dtype: str
    shape: tuple[int, ...]


Header = dict[str, TensorInfo]


def bits_of(info: TensorInfo) -> int:
    """Bits of an element of a tensor in a safetensors file."""
    return _BITS[info.dtype]


def read_header(path: Path) -> Header:
    """Tensor name → type and shape, for a safetensors file or a PyTorch state dict.

    Raises:
        WeightsError: the file is missing, cut off, or of another format.
    """
    if not path.is_file():
        raise WeightsError(
            "the model file does not exist",
            where=str(path.absolute()),
            do="correct the path or download it",
        )
    if path.suffix in TORCH_SUFFIXES:
        return _torch_header(path)
    if path.suffix != ".safetensors":
        raise WeightsError(
            f"'{path.suffix or path.name}' is no model file format",
            where=str(path),
            do="give a .safetensors file or a PyTorch state dict (.pth, .pt, .bin, .ckpt)",
        )
    return _safetensors_header(path)[0]


def read_metadata(path: Path) -> dict[str, str]:
    """The text entries in the header of a safetensors file. Raises `WeightsError`."""
    return _safetensors_header(path)[1]


def _safetensors_header(path: Path) -> tuple[Header, dict[str, str]]:
    """The tensors and the text entries in the header of a safetensors file. Raises
    `WeightsError`."""
    try:
        header, size = _read_json(path)
        metadata = _checked_metadata(header.pop("__metadata__", {}))
        spans = {name: _checked_entry(name, entry) for name, entry in header.items()}
        _require_filled([span for _, span in spans.values()], size)
    except (OSError, ValueError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise WeightsError(
            f"the file is not a whole safetensors file: {reason}",
            where=str(path),
            do="download or copy it again; it may have been cut off",
        ) from error
    return {name: info for name, (info, _) in spans.items()}, metadata


def _read_json(path: Path) -> tuple[dict[str, Any], int]:
    """The header as JSON, and the size of the data behind it in bytes.

    Raises:
        OSError, ValueError, RecursionError: there is none.
    """
    size = path.stat().st_size - 8
    with path.open("rb") as file:
        start = file.read(8)
        length = int.from_bytes(start, "little")
        if len(start) < 8 or length > min(size, _LARGEST_HEADER):
            raise ValueError("it does not start with a header")
        header = json.loads(file.read(length).decode("utf-8"))
    if not isinstance(header, dict):
        raise ValueError("its header is no mapping")
    return cast(dict[str, Any], header), size - length


def _checked_metadata(metadata: object) -> dict[str, str]:
    """The text entries of a header. Raises `ValueError`."""
    if not isinstance(metadata, dict):
        raise ValueError("the metadata in its header is no mapping")
    texts = cast(dict[str, object], metadata)
    if not all(isinstance(text, str) for text in texts.values()):
        raise ValueError("the metadata in its header is not text")
    return cast(dict[str, str], texts)


def _checked_entry(name: str, entry: object) -> tuple[TensorInfo, tuple[int, int]]:
    """What a header says about a tensor, and where its bytes start and end.

    Raises:
        ValueError: it says too little, or nonsense.
    """
    if not is_text(name):
        raise ValueError(f"no tensor can be called '{name}'")
    if not isinstance(entry, dict):
        raise ValueError(f"its header says nothing about '{name}'")
    info = cast(dict[str, object], entry)
    dtype, shape, span = info.get("dtype"), info.get("shape"), info.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in _BITS:
        raise ValueError(f"'{name}' has no known type: {shown(dtype)}")
    if not _are_sizes(shape):
        raise ValueError(f"'{name}' has no shape: {shown(shape)}")
    if not _are_sizes(span) or len(span) != 2:
        raise ValueError(f"the bytes of '{name}' are nowhere: {shown(span)}")
    # A tensor with a side of 0 has no bytes, whatever the other sides are.
    if prod(side for side in shape if side) > _LARGEST_SIZE:
        raise ValueError(f"'{name}' has an impossible shape: {shown(shape)}")
    if prod(shape) * _BITS[dtype] != (span[1] - span[0]) * 8:
        raise ValueError(f"'{name}' of shape {shown(shape)} has {span[1] - span[0]} bytes")
    return TensorInfo(dtype, tuple(shape)), (span[0], span[1])


def _are_sizes(value: object) -> TypeGuard[list[int]]:
    """Whether a value is a list of integers that are not negative."""
    return isinstance(value, list) and all(
        type(item) is int and item >= 0 for item in cast(list[object], value)
    )


def _require_filled(spans: Iterable[tuple[int, int]], size: int) -> None:
    """Check that the tensors fill the data of a file one after another. Raises `ValueError`."""
    end = 0
    for start, stop in sorted(spans):
        if start != end:
            raise ValueError(f"its tensors leave a gap or overlap at byte {end} of the data")
        end = stop
    if end != size:
        raise ValueError(f"it has {size} bytes of data, not {end}")


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
