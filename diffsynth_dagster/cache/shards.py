"""Shards: safetensors files of encoded samples, each with an index that says what every tensor is."""

import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from blake3 import blake3
from safetensors import safe_open
from safetensors.torch import save_file

from diffsynth_dagster.cache.layout import LAYOUT_VERSION
from diffsynth_dagster.data.scan import read_notes, read_parquet
from diffsynth_dagster.errors import OutputError, StoreError
from diffsynth_dagster.files import write_whole
from diffsynth_dagster.seal import seal_is_broken, write_sealed

SHARD_BYTES = 256 * 1024 * 1024
SHARD_SECONDS = 60.0
POLARS_ERRORS = (OSError, pl.exceptions.PolarsError, pl.exceptions.PanicException)
"""What polars raises for a damaged file."""
_LAYOUT = "layout"
INDEX_SCHEMA = {
    "key": pl.String,
    "output": pl.String,
    "shard": pl.String,
    "dtype": pl.String,
    "shape": pl.List(pl.Int64),
    "bytes": pl.Int64,
    "digest": pl.String,
    "finite": pl.Boolean,
}


def damaged(file: Path, why: str) -> StoreError:
    """The error for a file of a store that cannot be used.

    Args:
        file: in a folder of the store.
    """
    store = file.parent.parent
    return StoreError(
        f"the store is damaged: {why}",
        where=str(file),
        do=f"run `python -m diffsynth_dagster.cache verify --drop --cache_path {store}`, and encode "
        "again: only what was lost is",
    )


def require_whole(file: Path) -> None:
    """Compare an index file with its seal.

    Raises:
        StoreError: it has other bytes than those that were written.
    """
    try:
        broken = seal_is_broken(file)
    except OSError as error:
        raise damaged(file, f"the index cannot be read: {error}") from error
    if broken:
        raise damaged(file, "the bytes of the index have changed")


def read_index(file: Path) -> pl.DataFrame:
    """The rows of an index file.

    Raises:
        StoreError: it is damaged.
    """
    require_whole(file)
    try:
        rows = read_parquet(file)
    except POLARS_ERRORS as error:
        why = " ".join(str(error).split())
        raise damaged(file, f"the index cannot be read: {why}") from error
    if (
        rows.schema != INDEX_SCHEMA
        or rows.select(pl.any_horizontal(pl.all().is_null()).any()).item()
    ):
        raise damaged(file, "the index has other columns, or values are missing")
    if (rows["shard"] != file.stem).any():
        raise damaged(file, "the index names another shard")
    return rows


def index_layout(file: Path) -> int:
    """The `LAYOUT_VERSION` that an index file was written with; 0 where it does not say so.

    Raises:
        StoreError: the file is damaged.
    """
    try:
        return int(read_notes(file).get(_LAYOUT, "0"))
    except (*POLARS_ERRORS, ValueError) as error:
        raise damaged(file, f"the index cannot be read: {error}") from error


def tensor_digest(tensor: torch.Tensor) -> str:
    """BLAKE3 of a tensor's bytes (contiguous, on the CPU)."""
    data: Any = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
    return blake3(data).hexdigest()


def index_row(key: str, output: str, shard: str, tensor: torch.Tensor) -> dict[str, Any]:
    """What the index says of a tensor."""
    return {
        "key": key,
        "output": output,
        "shard": shard,
        "dtype": str(tensor.dtype).removeprefix("torch."),
        "shape": list(tensor.shape),
        "bytes": tensor.numel() * tensor.element_size(),
        "digest": tensor_digest(tensor),
        "finite": bool(torch.isfinite(tensor).all()),
    }


class OpenShard:
    """A shard that is read, each tensor compared with its digest in the file's header.

    (Not with that in the index: what reads Parquet cannot be used in worker processes. Shards that
    were written before they had digests are read as they are.)

    Raises:
        OSError, SafetensorError: the shard is damaged.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: Any = safe_open(path, framework="pt", device="cpu").__enter__()
        # Sorted arrays: an index of many small tensors takes 100 bytes for each, and no object.
        digests: list[tuple[str, str]] = sorted((self._file.metadata() or {}).items())
        self._names: Any = np.array([name for name, _ in digests], dtype=bytes)
        self._digests: Any = np.array([digest for _, digest in digests], dtype=bytes)

    def read(self, key: str, output: str) -> torch.Tensor:
        """A tensor of the shard.

        Raises:
            StoreError: it is not what was written.
            OSError, SafetensorError: it cannot be read.
        """
        name = f"{key}.{output}"
        tensor: torch.Tensor = self._file.get_tensor(name)
        if len(self._names):
            place = int(np.searchsorted(self._names, name.encode()))
            known = place < len(self._names) and self._names[place] == name.encode()
            if not known or self._digests[place] != tensor_digest(tensor).encode():
                raise damaged(self._path, f"the bytes of {key[:16]}…/{output} have changed")
        return tensor


class ShardWriter:
    """Collects encoded samples and writes them as shards: when one is full, when it was filled for
    a minute, and when this context manager is left, also by an exception.

    What is added in one call lies in one shard, so that a batch is in the store as a whole or not at
    all.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._tensors: dict[str, torch.Tensor] = {}
        self._rows: list[dict[str, Any]] = []
        self._bytes = 0
        self._started = time.monotonic()

    def add(self, key: str, outputs: Mapping[str, torch.Tensor]) -> None:
        """Put the outputs of a sample under a key. Raises `OutputError` when a shard is written."""
        self.add_batch({key: outputs})

    def add_batch(self, samples: Mapping[str, Mapping[str, torch.Tensor]]) -> None:
        """Put samples into one shard: key → the outputs under it. Raises `OutputError` when a shard is
        written."""
        for key, outputs in samples.items():
            for output, tensor in outputs.items():
                stored = tensor.detach().to("cpu").contiguous().clone()
                self._tensors[f"{key}.{output}"] = stored
                self._rows.append(index_row(key, output, "", stored))
                self._bytes += self._rows[-1]["bytes"]
        if self._bytes >= SHARD_BYTES or time.monotonic() - self._started > SHARD_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Write what was collected as one shard. Raises `OutputError`."""
        if not self._tensors:
            return
        shard = uuid.uuid4().hex
        tensors, rows = self._tensors, [{**row, "shard": shard} for row in self._rows]
        digests = {f"{row['key']}.{row['output']}": row["digest"] for row in rows}
        write_whole(
            self._path / "shards" / f"{shard}.safetensors",
            lambda staged: save_file(tensors, staged, metadata=digests),
            self._bytes,
        )
        index = pl.DataFrame(rows, schema=INDEX_SCHEMA)
        write_sealed(
            self._path / "index" / f"{shard}.parquet",
            lambda staged, said: index.write_parquet(staged, metadata=said),
            {_LAYOUT: str(LAYOUT_VERSION)},
        )
        self._tensors, self._rows, self._bytes = {}, [], 0
        self._started = time.monotonic()

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # What was added is whole, whatever came after; only a full disk stays a full disk.
        if kind is None or not issubclass(kind, OutputError):
            self.flush()
