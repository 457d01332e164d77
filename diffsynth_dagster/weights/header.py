"""Read the names, types and shapes of the tensors in a model file, not the tensors themselves."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open

from diffsynth_dagster.errors import WeightsError

PROVENANCE_KEY = "diffsynth_dagster"
"""Header entry in the files of this trainer: where the file comes from, as JSON."""
TORCH_SUFFIXES = (".pth", ".pt", ".bin", ".ckpt")


@dataclass(frozen=True)
class TensorInfo:
    """Element type and shape of a tensor. The type is written as in the file: `BF16` in
    safetensors, `bfloat16` in PyTorch state dicts."""

    dtype: str
    shape: tuple[int, ...]


Header = dict[str, TensorInfo]


def read_header(path: Path) -> Header:
    """Read tensor name → type and shape from a safetensors file or a PyTorch state dict.

    Raises:
        WeightsError: the file is missing, truncated, or of another format.
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
    """The tensors and text entries in the header of a safetensors file. Raises `WeightsError`."""
    try:
        # safe_open refuses a truncated file: the tensors must fill it without a gap or an overlap.
        # "numpy" has no bfloat16, which does not matter: no tensor is read.
        with safe_open(path, "numpy") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            header = {n: TensorInfo(s.get_dtype(), tuple(s.get_shape())) for n, s in slices.items()}
            return header, file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise WeightsError(
            f"the file is not a whole safetensors file: {error}",
            where=str(path),
            do="download or copy it again; it may have been cut off",
        ) from error


def _torch_header(path: Path) -> Header:
    from diffsynth_dagster.weights.torch_file import read_torch_file

    # A state dict has no header; its tensors are memory-mapped, so this reads little.
    tensors = read_torch_file(path)
    return {
        name: TensorInfo(str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))
        for name, tensor in tensors.items()
    }


def read_headers(paths: Iterable[Path]) -> Header:
    """Read and merge the headers of the shards of one model.

    Raises:
        WeightsError: see `read_header`; or two shards have a tensor of the same name.
    """
    merged: Header = {}
    for path in paths:
        header = read_header(path)
        twice = merged.keys() & header.keys()
        if twice:  # shards of two models, or one model in two precisions
            raise WeightsError(
                f"the tensor '{min(twice)}' stands in more than one of the files",
                where=str(path),
                do="name the shards of one model only; check the pattern",
            )
        merged.update(header)
    return merged
