"""The store: safetensors shards plus a Parquet index, keyed by content.

    <store>/shards/<shard>.safetensors     tensors named `<key>.<output>`
    <store>/index/<shard>.parquet          one row for each tensor of the shard
    <store>/users/<digest>.json            a run folder whose samples the store holds
    <store>/lock                           held by whoever uses the store, alone by the clean-up

A shard is staged and renamed, then its index is; readers use only what an index names, so an
interrupted writer leaves nothing that is read. Writers never touch each other's files: any number
of processes may write at once. Where two wrote the same key, the first by name is read.
"""

import contextlib
import fcntl
import json
import os
import socket
import time
from collections import OrderedDict
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import polars as pl
import torch
from safetensors import SafetensorError

from diffsynth_dagster.cache.shards import (
    INDEX_SCHEMA,
    POLARS_ERRORS,
    OpenShard,
    ShardWriter,
    damaged,
    read_index,
    require_whole,
)
from diffsynth_dagster.data.scan import scan_parquet
from diffsynth_dagster.errors import OutputError, StoreError
from diffsynth_dagster.facts import digest_text
from diffsynth_dagster.files import remove_leftovers, write_text
from diffsynth_dagster.own_names import is_of_store

LOST = ".lost"
"""How the name of a damaged note ends after it was put aside."""
_OPEN_SHARDS = 64
_LOOK_EVERY_S, _SAY_EVERY_S = 0.2, 60.0
"""While a clean-up is waited for."""


class Store:
    """A store, read and written.

    Where a key lies is looked up in the index files for many keys at once; no key is kept in
    memory.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._open: OrderedDict[str, OpenShard] = OrderedDict()
        self._whole: set[Path] = set()

    @property
    def index_files(self) -> list[Path]:
        """The index files, sorted."""
        return self._own("index")

    @property
    def shard_files(self) -> list[Path]:
        """The shards, also those that no index names, sorted."""
        return self._own("shards")

    def _own(self, folder: str) -> list[Path]:
        """The files of a folder of the store that have the names of the store's own, sorted."""
        files = (self.path / folder).glob("*")
        return sorted(file for file in files if is_of_store(f"{folder}/{file.name}"))

    def scan(self) -> pl.LazyFrame:
        """Every row of every index file, lazily: to be collected with `collect`.

        Raises:
            StoreError: an index file is damaged.
        """
        files = self.index_files
        for file in files:
            if file not in self._whole:
                require_whole(file)
                self._whole.add(file)
        # With the schema given, no file is looked into before the frame is collected.
        none = pl.LazyFrame(schema=INDEX_SCHEMA)
        return scan_parquet(files, INDEX_SCHEMA) if files else none

    def collect(self, frame: pl.LazyFrame) -> pl.DataFrame:
        """A frame that was made from `scan`.

        Raises:
            StoreError: an index file is damaged.
        """
        try:
            return frame.collect(engine="streaming")
        except POLARS_ERRORS:
            for file in self.index_files:
                read_index(file)
            raise

    def index(self) -> pl.DataFrame:
        """Every row of every index file. Raises `StoreError`."""
        return self.collect(self.scan())

    def places(self, keys: pl.LazyFrame) -> pl.DataFrame:
        """Where keys lie. Raises `StoreError`.

        Args:
            keys: a column `key`, each once.

        Returns:
            `key` and `shard` of those that the store holds, in no order.
        """
        stored = self.scan().select("key", "shard").join(keys, on="key", how="semi")
        return self.collect(stored.group_by("key").agg(pl.col("shard").min()))

    def missing(self, keys: pl.LazyFrame | Iterable[str]) -> pl.Series:
        """Those of the keys that are not in the store, each once; in order where a list is given.
        Raises `StoreError`.

        Args:
            keys: a column `key`, or texts.
        """
        if isinstance(keys, pl.LazyFrame):
            wanted = keys
        else:
            listed = list(dict.fromkeys(keys))
            wanted = pl.LazyFrame({"key": listed}, schema={"key": pl.String})
        absent = wanted.join(self.scan().select("key"), on="key", how="anti", maintain_order="left")
        return self.collect(absent.select("key")).to_series()

    def read(self, key: str) -> dict[str, torch.Tensor]:
        """The outputs stored under a key; see `read_from`. Looks through the index for it.

        Raises:
            StoreError: the key is not in the store, or its shard is damaged.
        """
        rows = self.collect(self.scan().filter(pl.col("key") == key).select("shard", "output"))
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
        allows. Each is what was written: its digest says so.

        Raises:
            StoreError: the shard is damaged.
        """
        try:
            opened = self._shard(shard)
            return {output: opened.read(key, output) for output in outputs}
        except (OSError, SafetensorError) as error:
            raise damaged(self.path / "shards" / f"{shard}.safetensors", str(error)) from error

    def _shard(self, shard: str) -> OpenShard:
        if shard not in self._open:
            path = self.path / "shards" / f"{shard}.safetensors"
            self._open[shard] = OpenShard(path)
            if len(self._open) > _OPEN_SHARDS:
                self._open.popitem(last=False)
        self._open.move_to_end(shard)
        return self._open[shard]

    @contextmanager
    def in_use(
        self, alone: bool = False, waiting: Callable[[str], object] = lambda text: None
    ) -> Generator[None]:
        """Hold the store: together with others, after waiting for a clean-up to end; or `alone`,
        as the clean-up does. What killed writers left in it is removed.

        Args:
            waiting: called with what is waited for: at once, and every minute.

        Raises:
            StoreError: `alone`, while others hold it.
            OutputError: the folder cannot be written.
        """
        with self._open_lock() as lock:
            if not alone:
                self._wait_for(lock, waiting)
            elif not _taken(lock, fcntl.LOCK_EX):
                raise StoreError(
                    "the store is in use",
                    where=str(self.path),
                    do="try again when the other run is done",
                )
            else:
                with contextlib.suppress(OSError):  # a full disk is what a clean-up is for
                    lock.truncate(0)
                    os.write(
                        lock.fileno(), f"process {os.getpid()} on {socket.gethostname()}".encode()
                    )
            for folder in ("shards", "index", "users"):
                remove_leftovers(self.path / folder)
            yield

    def _open_lock(self) -> IO[str]:
        """The file that is locked. Raises `OutputError`."""
        path = self.path / "lock"
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            return path.open("a+", encoding="utf-8", errors="replace")
        except OSError as error:
            raise OutputError(
                f"the store cannot be written: {error}",
                where=str(self.path),
                do="give a cache_path that can be written",
            ) from error

    def _wait_for(self, lock: IO[str], waiting: Callable[[str], object]) -> None:
        """Wait until no clean-up holds the store."""
        said = None
        while not _taken(lock, fcntl.LOCK_SH):
            if said is None or time.monotonic() - said > _SAY_EVERY_S:
                lock.seek(0)
                owner = lock.read(200) or "another process"
                waiting(f"waiting for the clean-up of the store {self.path} by {owner}")
                said = time.monotonic()
            time.sleep(_LOOK_EVERY_S)

    def add_user(self, folder: Path) -> None:
        """Note that a run folder's samples lie here. Raises `OutputError`."""
        text = str(folder.absolute())
        path = self.path / "users" / f"{digest_text(text)[:32]}.json"
        if not path.is_file():
            write_text(path, json.dumps({"run_folder": text}) + "\n")
        path.with_suffix(LOST).unlink(missing_ok=True)

    @property
    def notes(self) -> list[Path]:
        """The files that note run folders, sorted."""
        return self._own("users")

    @property
    def lost_notes(self) -> list[Path]:
        """Damaged notes that were put aside, sorted."""
        return sorted((self.path / "users").glob(f"*{LOST}"))

    def users(self) -> list[Path]:
        """The run folders that were noted, sorted.

        Raises:
            StoreError: a note is damaged, so that it is not known what the store is used for.
        """
        return sorted(map(read_note, self.notes))

    def writer(self) -> ShardWriter:
        """A writer of its own shards."""
        return ShardWriter(self.path)

    def __getstate__(self) -> dict[str, Any]:
        """Worker processes open their own shards."""
        return {**self.__dict__, "_open": OrderedDict()}


def read_note(file: Path) -> Path:
    """The run folder in a note of `Store.add_user`. Raises `StoreError`."""
    try:
        return Path(json.loads(file.read_text(encoding="utf-8"))["run_folder"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise damaged(file, f"the note of a run folder cannot be read: {error}") from error


def _taken(lock: IO[str], how: int) -> bool:
    """Take a lock, if others leave it. Raises `OSError`."""
    # Not filelock's: its lock of many readers and one writer is an SQLite database. A store's lock would
    # need another name, which older versions do not look at, and a file of its own for who holds it.
    try:
        fcntl.flock(lock, how | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
