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

from diffsynth_dagster.errors import OutputError, StoreError
from diffsynth_dagster.facts import digest_text
from diffsynth_dagster.files import write_text, write_whole

SHARD_BYTES = 256 * 1024 * 1024
SHARD_SECONDS = 60.0
_OPEN_SHARDS = 64
_SCHEMA = {
    "key": pl.String,
    "output": pl.String,
    "shard": pl.String,
    "dtype": pl.String,
    "shape": pl.List(pl.Int64),
    "bytes": pl.Int64,
    "digest": pl.String,
    "finite": pl.Boolean,
}


def tensor_digest(tensor: torch.Tensor) -> str:
    """BLAKE3 of a tensor's bytes (contiguous, on the CPU)."""
    data: Any = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
    return blake3(data).hexdigest()


class Store:
    """A store, read and written."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._places: dict[str, tuple[str, list[str]]] = {}
        self._indexed: set[Path] = set()
        self._open: OrderedDict[str, Any] = OrderedDict()

    def refresh(self) -> None:
        """Take in the index files written since the last look."""
        for file in sorted((self.path / "index").glob("*.parquet")):
            if file in self._indexed:
                continue
            table = pl.read_parquet(file, columns=["key", "shard", "output"])
            for key, shard, output in table.iter_rows():
                place = self._places.setdefault(key, (shard, []))
                if place[0] == shard:
                    place[1].append(output)
            self._indexed.add(file)

    def missing(self, keys: Iterable[str]) -> list[str]:
        """Those of the keys that are not in the store, each once, in order."""
        self.refresh()
        return [key for key in dict.fromkeys(keys) if key not in self._places]

    def index(self) -> pl.DataFrame:
        """Every row of every index file."""
        files = sorted((self.path / "index").glob("*.parquet"))
        tables = [pl.read_parquet(file) for file in files]
        return pl.concat(tables) if tables else pl.DataFrame(schema=_SCHEMA)

    def read(self, key: str) -> dict[str, torch.Tensor]:
        """The outputs stored under a key: views of the memory-mapped shard where alignment allows.

        Raises:
            StoreError: the key is not in the store, or its shard is damaged.
        """
        if key not in self._places:
            self.refresh()
        if key not in self._places:
            raise StoreError(
                f"the store lacks the sample {key[:16]}…",
                where=str(self.path),
                do="run the task sft:data_process again",
            )
        shard, outputs = self._places[key]
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
            lambda staged: pl.DataFrame(rows, schema=_SCHEMA).write_parquet(staged),
        )
        self._tensors, self._rows, self._bytes = {}, [], 0
        self._started = time.monotonic()

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # What was added is whole, whatever came after; only a full disk stays a full disk.
        if kind is None or not issubclass(kind, OutputError):
            self.flush()
