"""Writing files so that they are either whole or not there."""

import json
import os
import struct
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from diffsynth_dagster.errors import OutputError

if TYPE_CHECKING:
    import torch

_UMASK = os.umask(0o077)
os.umask(_UMASK)


def write_whole(path: Path, write: Callable[[Path], None]) -> Path:
    """Let `write` make a hidden file beside `path`, flush it to disk, and rename it to `path`.

    Raises:
        OutputError: the folder cannot be written, or the disk is full.
    """
    staged = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            write(staged)
            with staged.open("rb") as file:
                os.fsync(file.fileno())
            staged.chmod(0o666 & ~_UMASK)
            staged.replace(path)
        finally:
            staged.unlink(missing_ok=True)
    except OSError as error:
        raise OutputError(
            f"the file cannot be written: {error}",
            where=str(path),
            do="check the folder's permissions and the space on the disk",
        ) from error
    return path


def write_text(path: Path, text: str) -> Path:
    """Write a text file whole. Raises `OutputError`."""

    def write(staged: Path) -> None:
        staged.write_text(text, encoding="utf-8")

    return write_whole(path, write)


def write_tensors(
    path: Path, tensors: "Mapping[str, torch.Tensor]", metadata: Mapping[str, str]
) -> Path:
    """Write a safetensors file whole. Equal tensors and metadata give equal bytes.

    Raises:
        OutputError: see `write_whole`.
    """
    from safetensors.torch import save_file

    ordered = {name: tensors[name] for name in sorted(tensors)}

    def write(staged: Path) -> None:
        save_file(ordered, staged, metadata=dict(metadata))
        _sort_metadata(staged)

    return write_whole(path, write)


def _sort_metadata(path: Path) -> None:
    """Put the header's text entries in order: safetensors writes them in a random one.

    The header keeps its length, so the tensors stay where they are.
    """
    with path.open("r+b") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        assert len(text) <= length, "safetensors writes compact JSON"
        file.seek(8)
        file.write(text.ljust(length))


def require_writable(folder: Path, parameter: str) -> None:
    """Make a folder and try it.

    Raises:
        OutputError: it cannot be made or written.
    """
    probe = folder / f".probe-{uuid.uuid4().hex[:8]}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        raise OutputError(
            f"the folder cannot be written: {error.strerror or error}",
            where=f"{parameter} = {folder}",
            do="give a folder that can be written",
        ) from error
