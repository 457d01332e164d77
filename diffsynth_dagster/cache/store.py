"""The store: safetensors shards plus a Parquet index, keyed by content.

    <store>/shards/<shard>.safetensors     tensors named `<key>.<output>`
    <store>/index/<shard>.parquet          one row for each tensor of the shard
    <store>/users/<digest>.json            a run folder whose samples the store holds
    <store>/lock                           shared by all who use the store, exclusive for a clean-up

A writer first renames a finished shard into place, then its index. Readers use only what an index
names, so they never see what an interrupted writer left. Writers never touch each other's files, so
any number of processes may write at once. If two have written the same key, readers take the shard
whose name is first.
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
"""The suffix of a damaged note of a user that was put aside by `verify --drop`."""
_OPEN_SHARDS = 64
"""Shards kept open for reading, the last used ones; each takes a file descriptor and a mapping."""
_LOOK_EVERY_S, _SAY_EVERY_S = 0.2, 60.0
"""While waiting for a clean-up: how often the lock is tried, and how often a message is given."""


class Store:
    """A store of encoded samples.

    Keys are looked up in the index files, for many keys at once. The index is not kept in memory.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._open: OrderedDict[str, OpenShard] = OrderedDict()
        self._whole: set[Path] = set()  # index files whose seals have been checked

    @property
    def index_files(self) -> list[Path]:
        """The index files, sorted by name."""
        return self._own("index")

    @property
    def shard_files(self) -> list[Path]:
        """The shards, including those without an index, sorted by name."""
        return self._own("shards")

    def _own(self, folder: str) -> list[Path]:
        """The files that the store has written into one of its folders, sorted by name."""
        # Recognised by name: other files there are the user's, and must not be read or removed.
        files = (self.path / folder).glob("*")
        return sorted(file for file in files if is_of_store(f"{folder}/{file.name}"))

    def scan(self) -> pl.LazyFrame:
        """All rows of all index files, as a lazy frame. Collect it with `collect`.

        Raises:
            StoreError: an index file is damaged.
        """
        files = self.index_files
        for file in files:
            if file not in self._whole:
                require_whole(file)
                self._whole.add(file)
        # The schema is given so that Polars opens no file before the frame is collected.
        none = pl.LazyFrame(schema=INDEX_SCHEMA)
        return scan_parquet(files, INDEX_SCHEMA) if files else none

    def collect(self, frame: pl.LazyFrame) -> pl.DataFrame:
        """Collect a frame that was made from `scan`.

        Raises:
            StoreError: an index file is damaged.
        """
        try:
            return frame.collect(engine="streaming")
        except POLARS_ERRORS:
            # Polars does not say which file it was: read them one by one to name it.
            for file in self.index_files:
                read_index(file)
            raise

    def index(self) -> pl.DataFrame:
        """All rows of all index files, in memory. Raises `StoreError`."""
        return self.collect(self.scan())

    def places(self, keys: pl.LazyFrame) -> pl.DataFrame:
        """Find the shards that hold keys.

        Args:
            keys: a frame with the column `key`, every key once.

        Returns:
            `key` and `shard` of the keys that the store holds, in no particular order.

        Raises:
            StoreError: an index file is damaged.
        """
        stored = self.scan().select("key", "shard").join(keys, on="key", how="semi")
        # `min`: all processes choose the same one of two shards with the same key.
        return self.collect(stored.group_by("key").agg(pl.col("shard").min()))

    def missing(self, keys: pl.LazyFrame | Iterable[str]) -> pl.Series:
        """The keys that the store lacks.

        Args:
            keys: a frame with the column `key`, or a list of keys.

        Returns:
            The missing keys in the given order; duplicates in a list are dropped.

        Raises:
            StoreError: an index file is damaged.
        """
        if isinstance(keys, pl.LazyFrame):
            wanted = keys
        else:
            listed = list(dict.fromkeys(keys))
            wanted = pl.LazyFrame({"key": listed}, schema={"key": pl.String})
        absent = wanted.join(self.scan().select("key"), on="key", how="anti", maintain_order="left")
        return self.collect(absent.select("key")).to_series()

    def read(self, key: str) -> dict[str, torch.Tensor]:
        """Read all outputs of a key. This searches the index; `read_from` does not.

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
        """Read outputs of a key from a shard; their digests are checked.

        Returns:
            Output → tensor: a view of the memory-mapped shard where alignment allows it.

        Raises:
            StoreError: the shard is damaged.
        """
        try:
            opened = self._shard(shard)
            return {output: opened.read(key, output) for output in outputs}
        except (OSError, SafetensorError) as error:
            raise damaged(self.path / "shards" / f"{shard}.safetensors", str(error)) from error

    def _shard(self, shard: str) -> OpenShard:
        """A shard, opened if it is not open; the least recently used one is closed for it."""
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
        """Lock the store while the block runs, and remove what killed writers left in it.

        Args:
            alone: take the lock exclusively, as a clean-up does. Otherwise it is shared with other
                trainings, after a running clean-up has ended.
            waiting: called with a message while a clean-up is waited for: at once, then every
                minute.

        Raises:
            StoreError: `alone`, and others hold the lock.
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
                # Say who holds the lock, for the message of those that wait. On a full disk this
                # fails; then a clean-up is needed all the more.
                with contextlib.suppress(OSError):
                    lock.truncate(0)
                    os.write(
                        lock.fileno(), f"process {os.getpid()} on {socket.gethostname()}".encode()
                    )
            for folder in ("shards", "index", "users"):
                remove_leftovers(self.path / folder)
            yield

    def _open_lock(self) -> IO[str]:
        """Open the file that is locked; closing it releases the lock. Raises `OutputError`."""
        path = self.path / "lock"
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            # Not "w+", which would erase the name of the holder.
            return path.open("a+", encoding="utf-8", errors="replace")
        except OSError as error:
            raise OutputError(
                f"the store cannot be written: {error}",
                where=str(self.path),
                do="give a cache_path that can be written",
            ) from error

    def _wait_for(self, lock: IO[str], waiting: Callable[[str], object]) -> None:
        """Take the shared lock; wait while a clean-up holds the exclusive one."""
        told_at = None
        while not _taken(lock, fcntl.LOCK_SH):
            if told_at is None or time.monotonic() - told_at > _SAY_EVERY_S:
                lock.seek(0)
                owner = lock.read(200) or "another process"
                waiting(f"waiting for the clean-up of the store {self.path} by {owner}")
                told_at = time.monotonic()
            time.sleep(_LOOK_EVERY_S)

    def add_user(self, folder: Path) -> None:
        """Note that a run folder uses this store, so that a clean-up keeps its samples.

        Raises:
            OutputError: the note cannot be written.
        """
        text = str(folder.absolute())
        path = self.path / "users" / f"{digest_text(text)[:32]}.json"
        if not path.is_file():
            write_text(path, json.dumps({"run_folder": text}) + "\n")
        path.with_suffix(LOST).unlink(missing_ok=True)

    @property
    def notes(self) -> list[Path]:
        """The notes of `add_user`, sorted by name."""
        return self._own("users")

    @property
    def lost_notes(self) -> list[Path]:
        """Damaged notes that were put aside, sorted by name."""
        return sorted((self.path / "users").glob(f"*{LOST}"))

    def users(self) -> list[Path]:
        """The run folders that use this store, sorted; some may not exist any more.

        Raises:
            StoreError: a note is damaged.
        """
        return sorted(map(read_note, self.notes))

    def writer(self) -> ShardWriter:
        """A writer that adds shards to this store."""
        return ShardWriter(self.path)

    def __getstate__(self) -> dict[str, Any]:
        """Pickle without the open shards: a worker process opens its own."""
        return {**self.__dict__, "_open": OrderedDict()}


def read_note(file: Path) -> Path:
    """The run folder that a note of `Store.add_user` names. Raises `StoreError`: it is damaged."""
    try:
        return Path(json.loads(file.read_text(encoding="utf-8"))["run_folder"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise damaged(file, f"the note of a run folder cannot be read: {error}") from error


def _taken(lock: IO[str], how: int) -> bool:
    """Try to take a lock without waiting; whether it was taken. Raises `OSError`."""
    # `filelock` would need an SQLite database for a shared lock, and so a lock file of another
    # name, which older versions of this program would not respect.
    try:
        fcntl.flock(lock, how | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
