"""The store: safetensors shards plus a Parquet index, keyed by content.

    <store>/shards/<shard>.safetensors     tensors named `<key>.<output>`
    <store>/index/<shard>.parquet          one row for each tensor of the shard
    <store>/users/<digest>.json            a run folder whose samples the store holds
    <store>/lock                           held by whoever uses the store, alone by the clean-up

A shard is staged and renamed, then its index is; readers use only what an index names, so an
interrupted writer leaves nothing that is read. Writers never touch each other's files: any number
of processes may write at once. Where two wrote the same key, the first by name is read.
"""

import fcntl
import json
import time
import uuid
from collections import OrderedDict
from collections.abc import Generator, Iterable, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import polars as pl
import torch
from blake3 import blake3
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from diffsynth_dagster.cache.layout import LAYOUT_VERSION
from diffsynth_dagster.errors import OutputError, StoreError
from diffsynth_dagster.facts import digest_text
from diffsynth_dagster.files import write_text, write_whole

SHARD_BYTES = 256 * 1024 * 1024
SHARD_SECONDS = 60.0
_OPEN_SHARDS = 64
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


def index_layout(file: Path) -> int:
    """The `LAYOUT_VERSION` that an index file was written with; 0 where it does not say so."""
    return int(pl.read_parquet_metadata(file).get(_LAYOUT, "0"))


def tensor_digest(tensor: torch.Tensor) -> str:
    """BLAKE3 of a tensor's bytes (contiguous, on the CPU)."""
    data: Any = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
    return blake3(data).hexdigest()


class Store:
    """A store, read and written.

    Where a key lies is looked up in the index files for many keys at once; no key is kept in
    memory.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._open: OrderedDict[str, Any] = OrderedDict()

    def scan(self) -> pl.LazyFrame:
        """Every row of every index file, lazily."""
        files = sorted((self.path / "index").glob("*.parquet"))
        return pl.scan_parquet(files) if files else pl.LazyFrame(schema=INDEX_SCHEMA)

    def index(self) -> pl.DataFrame:
        """Every row of every index file."""
        return self.scan().collect()

    def places(self, keys: pl.LazyFrame) -> pl.LazyFrame:
        """Where keys lie.

        Args:
            keys: a column `key`, each once.

        Returns:
            `key` and `shard` of those that the store holds, in no order.
        """
        stored = self.scan().select("key", "shard").join(keys, on="key", how="semi")
        return stored.group_by("key").agg(pl.col("shard").min())

    def missing(self, keys: pl.LazyFrame | Iterable[str]) -> pl.Series:
        """Those of the keys that are not in the store, each once; in order where a list is given.

        Args:
            keys: a column `key`, or texts.
        """
        if isinstance(keys, pl.LazyFrame):
            wanted = keys
        else:
            listed = list(dict.fromkeys(keys))
            wanted = pl.LazyFrame({"key": listed}, schema={"key": pl.String})
        absent = wanted.join(self.scan().select("key"), on="key", how="anti", maintain_order="left")
        return absent.select("key").collect(engine="streaming").to_series()

    def read(self, key: str) -> dict[str, torch.Tensor]:
        """The outputs stored under a key; see `read_from`. Looks through the index for it.

        Raises:
            StoreError: the key is not in the store, or its shard is damaged.
        """
        rows = self.scan().filter(pl.col("key") == key).select("shard", "output").collect()
        if rows.height == 0:
            raise StoreError(
                f"the store lacks the sample {key[:16]}…",
                where=str(self.path),
                do="run the task sft:data_process again",
            )
        first = str(rows["shard"].min())
        return self.read_from(first, key, rows.filter(pl.col("shard") == first)["output"])

    def read_from(self, shard: str, key: str, outputs: Iterable[str]) -> dict[str, torch.Tensor]:
        """Outputs stored under a key in a shard: views of the memory-mapped shard where alignment
        allows.

        Raises:
            StoreError: the shard is damaged.
        """
        try:
            file = self._shard(shard)
            return {output: file.get_tensor(f"{key}.{output}") for output in outputs}
        except (OSError, SafetensorError) as error:
            raise StoreError(
                f"the shard cannot be read: {error}",
                where=str(self.path / "shards" / shard),
                do="remove its file in index/ and run the task sft:data_process again",
            ) from error

    def _shard(self, shard: str) -> Any:
        if shard not in self._open:
            path = self.path / "shards" / f"{shard}.safetensors"
            self._open[shard] = safe_open(path, framework="pt", device="cpu").__enter__()
            if len(self._open) > _OPEN_SHARDS:
                self._open.popitem(last=False)
        self._open.move_to_end(shard)
        return self._open[shard]

    @contextmanager
    def in_use(self, alone: bool = False) -> Generator[None]:
        """Hold the store: together with others, after waiting for a clean-up to end; or `alone`,
        as the clean-up does.

        Raises:
            StoreError: `alone`, while others hold it.
            OutputError: the folder cannot be written.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock = (self.path / "lock").open("w")
        except OSError as error:
            raise OutputError(
                f"the store cannot be written: {error}",
                where=str(self.path),
                do="give a cache_path that can be written",
            ) from error
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB if alone else fcntl.LOCK_SH)
            except BlockingIOError as error:
                raise StoreError(
                    "the store is in use",
                    where=str(self.path),
                    do="try again when the other run is done",
                ) from error
            yield

    def add_user(self, folder: Path) -> None:
        """Note that a run folder's samples lie here. Raises `OutputError`."""
        text = str(folder.absolute())
        path = self.path / "users" / f"{digest_text(text)[:32]}.json"
        if not path.is_file():
            write_text(path, json.dumps({"run_folder": text}) + "\n")

    def users(self) -> list[Path]:
        """The run folders that were noted, sorted."""
        files = (self.path / "users").glob("*.json")
        return sorted(Path(json.loads(file.read_text())["run_folder"]) for file in files)

    def writer(self) -> "ShardWriter":
        """A writer of its own shards."""
        return ShardWriter(self.path)

    def __getstate__(self) -> dict[str, Any]:
        """Worker processes open their own shards."""
        return {**self.__dict__, "_open": OrderedDict()}


class ShardWriter:
    """Collects encoded samples and writes them as shards: when one is full, when it was filled for
    a minute, and when this context manager is left, also by an exception."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._tensors: dict[str, torch.Tensor] = {}
        self._rows: list[dict[str, Any]] = []
        self._bytes = 0
        self._started = time.monotonic()

    def add(self, key: str, outputs: Mapping[str, torch.Tensor]) -> None:
        """Put the outputs of a sample under a key. Raises `OutputError` when a shard is written."""
        for output, tensor in outputs.items():
            stored = tensor.detach().to("cpu").contiguous().clone()
            size = stored.numel() * stored.element_size()
            self._tensors[f"{key}.{output}"] = stored
            self._rows.append(
                {
                    "key": key,
                    "output": output,
                    "shard": "",
                    "dtype": str(stored.dtype).removeprefix("torch."),
                    "shape": list(stored.shape),
                    "bytes": size,
                    "digest": tensor_digest(stored),
                    "finite": bool(torch.isfinite(stored).all()),
                }
            )
            self._bytes += size
        if self._bytes >= SHARD_BYTES or time.monotonic() - self._started > SHARD_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Write what was collected as one shard. Raises `OutputError`."""
        if not self._tensors:
            return
        shard = uuid.uuid4().hex
        tensors, rows = self._tensors, [{**row, "shard": shard} for row in self._rows]
        write_whole(
            self._path / "shards" / f"{shard}.safetensors",
            lambda staged: save_file(tensors, staged),
        )
        write_whole(
            self._path / "index" / f"{shard}.parquet",
            lambda staged: pl.DataFrame(rows, schema=INDEX_SCHEMA).write_parquet(
                staged, metadata={_LAYOUT: str(LAYOUT_VERSION)}
            ),
        )
        self._tensors, self._rows, self._bytes = {}, [], 0
        self._started = time.monotonic()

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # What was added is whole, whatever came after; only a full disk stays a full disk.
        if kind is None or not issubclass(kind, OutputError):
            self.flush()
