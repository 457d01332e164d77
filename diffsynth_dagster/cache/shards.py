"""Shards: safetensors files of encoded samples, each with an index file that lists its tensors."""

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
"""A shard is written when its tensors have this many bytes."""
SHARD_SECONDS = 60.0
"""A shard is written at the latest after this time: a killed run loses no more work than that."""
POLARS_ERRORS = (OSError, pl.exceptions.PolarsError, pl.exceptions.PanicException)
"""The exceptions that Polars raises for a damaged file."""
_LAYOUT = "layout"
"""The entry of an index file's metadata with its `LAYOUT_VERSION`."""
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
    """The error for a damaged file of a store.

    Args:
        file: a file in a folder of the store.
        why: what is wrong with it.
    """
    store = file.parent.parent
    return StoreError(
        f"the store is damaged: {why}",
        where=str(file),
        do=f"run `python -m diffsynth_dagster.cache verify --drop --cache_path {store}`, and "
        "encode again: only what was lost is",
    )


def require_whole(file: Path) -> None:
    """Check an index file against its seal: see `seal.py`.

    Raises:
        StoreError: its bytes are not those that were written.
    """
    try:
        broken = seal_is_broken(file)
    except OSError as error:
        raise damaged(file, f"the index cannot be read: {error}") from error
    if broken:
        raise damaged(file, "the bytes of the index have changed")


def read_index(file: Path) -> pl.DataFrame:
    """Read and check an index file.

    Raises:
        StoreError: it is damaged.
    """
    require_whole(file)  # indices of older versions have no seal, hence the checks below
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
    """The `LAYOUT_VERSION` that an index file was written with; 0 if the file does not say.

    Raises:
        StoreError: the file is damaged.
    """
    try:
        return int(read_notes(file).get(_LAYOUT, "0"))
    except (*POLARS_ERRORS, ValueError) as error:
        raise damaged(file, f"the index cannot be read: {error}") from error


def tensor_digest(tensor: torch.Tensor) -> str:
    """BLAKE3 digest of the bytes of a tensor on the CPU."""
    # As bytes, since numpy has no bfloat16.
    data: Any = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
    return blake3(data).hexdigest()


def index_row(key: str, output: str, shard: str, tensor: torch.Tensor) -> dict[str, Any]:
    """The row of a tensor in the index: see `INDEX_SCHEMA`."""
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
    """An open shard. Every tensor that is read is compared with its digest in the file's header.

    Shards of older versions have no digests there; their tensors are not compared.

    Raises:
        OSError, SafetensorError: the shard is damaged.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        # Entered and never left: the file stays mapped as long as this object lives.
        self._file: Any = safe_open(path, framework="pt", device="cpu").__enter__()
        # Digests are taken from the header and not from the index, because data-loading workers
        # read shards, and Polars does not work in forked processes. They are kept as sorted arrays
        # of about 100 bytes per tensor, without a Python object for each of them.
        digests: list[tuple[str, str]] = sorted((self._file.metadata() or {}).items())
        self._names: Any = np.array([name for name, _ in digests], dtype=bytes)
        self._digests: Any = np.array([digest for _, digest in digests], dtype=bytes)

    def read(self, key: str, output: str) -> torch.Tensor:
        """Read a tensor of the shard.

        Raises:
            StoreError: its bytes are not those that were written.
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
    """A context manager that collects encoded samples and writes them as shards.

    A shard is written after `SHARD_BYTES` or `SHARD_SECONDS`, and when the context is left, also
    after an exception. The samples of one call are in the same shard, so a batch is stored as a
    whole or not at all.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._tensors: dict[str, torch.Tensor] = {}
        self._rows: list[dict[str, Any]] = []
        self._bytes = 0
        self._started = time.monotonic()

    def add(self, key: str, outputs: Mapping[str, torch.Tensor]) -> None:
        """Store the outputs of a sample under a key.

        Raises:
            OutputError: a shard is due and cannot be written.
        """
        self.add_batch({key: outputs})

    def add_batch(self, samples: Mapping[str, Mapping[str, torch.Tensor]]) -> None:
        """Store the outputs of several samples (key → outputs) in the same shard.

        Raises:
            OutputError: a shard is due and cannot be written.
        """
        for key, outputs in samples.items():
            for output, tensor in outputs.items():
                # A copy: a view would keep its whole batch in memory, and safetensors refuses
                # tensors that share memory.
                stored = tensor.detach().to("cpu").contiguous().clone()
                self._tensors[f"{key}.{output}"] = stored
                self._rows.append(index_row(key, output, "", stored))
                self._bytes += self._rows[-1]["bytes"]
        if self._bytes >= SHARD_BYTES or time.monotonic() - self._started > SHARD_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Write the collected samples as one shard. Raises `OutputError`."""
        if not self._tensors:
            return
        shard = uuid.uuid4().hex  # so that writers need not agree on names
        tensors, rows = self._tensors, [{**row, "shard": shard} for row in self._rows]
        digests = {f"{row['key']}.{row['output']}": row["digest"] for row in rows}
        # The shard before its index: readers only use shards that have an index.
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
        # The samples added so far are whole, whatever the exception is. But after an `OutputError`,
        # such as a full disk, a second attempt to write would fail, too.
        if kind is None or not issubclass(kind, OutputError):
            self.flush()
