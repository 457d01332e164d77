"""A cache of facts about files (digest, size in pixels, frames), keyed by path and file state.

A file whose state (size, times) is unchanged is not read again. The cache is an SQLite file beside
the store; it may be deleted at any time, and is then made again.
"""

import json
import os
import sqlite3
import time
import warnings
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple, TypeVar

from blake3 import blake3
from filelock import FileLock, Timeout

from diffsynth_dagster.errors import OutputError

FACTS = "facts.sqlite"
"""File name of the cache in the folder of a store."""
Facts = dict[str, Any]
Progress = Callable[[int], object]
"""Called with the number of files done since the last call."""
_Result = TypeVar("_Result")
_BATCH = 1024
_PATIENCE_S, _LOOK_EVERY_S = 60.0, 1.0
"""How long to wait, in total and per attempt, while another process holds the database."""
_WRITE_EVERY_S = 5.0
"""Facts are saved this often, so an interrupted run loses only the last few seconds."""
_TABLE = (
    "CREATE TABLE IF NOT EXISTS known (kind TEXT, path TEXT, size INTEGER,"
    " modified INTEGER, facts TEXT, sum TEXT, PRIMARY KEY (kind, path))"
)


def digest_file(path: Path) -> str:
    """BLAKE3 of a file's bytes, in hexadecimal."""
    hasher = blake3(max_threads=blake3.AUTO)
    hasher.update_mmap(path)
    return hasher.hexdigest()


def digest_text(text: str) -> str:
    """BLAKE3 of a text, in hexadecimal."""
    # JSON and paths may contain lone surrogates, which UTF-8 does not have.
    return blake3(text.encode("utf-8", "surrogatepass")).hexdigest()


def digest_of(value: Any) -> str:
    """BLAKE3 of a JSON value in its canonical form: sorted keys, no spaces."""
    return digest_text(json.dumps(value, sort_keys=True, separators=(",", ":")))


class FileState(NamedTuple):
    """The size and times of a file. If they are equal, its content is taken to be unchanged.

    Attributes:
        size: bytes.
        modified: digest of the times and the inode. The time of modification alone is not enough:
            copying programs set it to the original file's.
    """

    size: int
    modified: int

    @classmethod
    def of(cls, path: Path) -> "FileState":
        """The state of a file. Raises `OSError` if it does not exist."""
        stat = path.stat()
        # Programs can set the mtime, but not the ctime and the inode.
        marks = f"{stat.st_mtime_ns} {stat.st_ctime_ns} {stat.st_ino}"
        # 60 bits: SQLite's integers have 64, with a sign.
        return cls(stat.st_size, int(digest_text(marks)[:15], 16))


class FactCache:
    """A table from files to facts about them. Use it in a `with` block, which closes it.

    Several processes may use it at the same time.
    """

    def __init__(self, path: Path) -> None:
        """Open or create the cache at `path`.

        Raises:
            OutputError: the folder cannot be written, or another process holds the cache.
        """
        self._path = path
        self._lock = Lock()
        self._database: sqlite3.Connection | None = None
        self._inode: int | None = None
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise self._unusable(error) from error
        self._run(lambda database: None)

    def _alone(self) -> FileLock:
        """The lock under which the database is opened, and removed where it is damaged: SQLite finds
        the files `-wal` and `-shm` by their names, so they must not change in between."""
        return FileLock(self._path.with_name(f".{self._path.name}.lock"), timeout=_LOOK_EVERY_S)

    def _open(self) -> sqlite3.Connection:
        """Open the database. A damaged one is removed, and the error raised."""
        with self._alone():
            database = sqlite3.connect(self._path, timeout=_LOOK_EVERY_S, check_same_thread=False)
            try:
                database.execute("PRAGMA journal_mode=WAL")
                database.execute(_TABLE)
            except (sqlite3.Error, UnicodeDecodeError) as error:
                if _is_damage(error):
                    self._remove()
                database.close()
                raise
            self._database, self._inode = database, _inode(self._path)
        return database

    def _unusable(self, error: Exception) -> OutputError:
        if _is_busy(error):
            return OutputError(
                f"another process holds the cache of facts about files: {error}",
                where=str(self._path),
                do=f"wait until it is done, or end it (`fuser {self._path}` says which it is), and "
                "run this again",
            )
        return OutputError(
            f"the cache of facts about files cannot be used: {error}",
            where=str(self._path),
            do="give a cache_path that can be written, on a disk with space left; the cache itself "
            "may be deleted",
        )

    def _run(self, work: Callable[[sqlite3.Connection], _Result]) -> _Result:
        """Do something with the database: again while another process holds it, for a minute (SQLite
        itself would wait without hearing a signal), and once more in a new one where it is damaged.

        Raises:
            OutputError: the database cannot be read or written.
        """
        began, is_new = time.monotonic(), False
        # SQLite can wait by itself, but ignores signals meanwhile: so wait a second at a time.
        with self._lock:
            while True:
                try:
                    return work(self._database or self._open())
                except sqlite3.ProgrammingError:
                    raise
                except (OSError, sqlite3.Error, UnicodeDecodeError) as error:
                    waited = time.monotonic() - began
                    if _is_damage(error) and not is_new:
                        self._renew()
                        is_new = True
                    elif not _is_busy(error) or waited > _PATIENCE_S:
                        raise self._unusable(error) from error
                    elif waited < 2 * _LOOK_EVERY_S:
                        warnings.warn(f"waiting for {self._path}: {error}", stacklevel=2)

    def _renew(self) -> None:
        """Remove a damaged database, unless another process did so already. Raises `OutputError`."""
        if self._database is None:
            return  # it was removed when it was opened
        try:
            with self._alone():
                # While it is open, no other file is given its number.
                if _inode(self._path) == self._inode:
                    self._remove()
                self._database.close()
                self._database = None
        except OSError as error:
            raise self._unusable(error) from error

    def _remove(self) -> None:
        warnings.warn(
            f"{self._path} is damaged, and is made anew: what it knew of files is found out again",
            stacklevel=4,
        )
        for end in ("", "-wal", "-shm"):
            self._path.with_name(self._path.name + end).unlink(missing_ok=True)

    def look_up(
        self,
        kind: str,
        paths: Iterable[Path],
        find_out: Callable[[Path], Facts],
        again: bool = False,
        progress: Progress = lambda count: None,
    ) -> dict[Path, Facts]:
        """Facts about each file, from the cache; computed in threads for new and changed files.

        The facts of a file also have the `size` and `modified` of the `FileState` that they are
        about (unless the file does not exist).

        Args:
            kind: the kind of facts; each kind is cached separately.
            find_out: file → facts (values of JSON). A bad file gets a "status" entry, which is not
                cached; it must not raise.
            again: compute the facts even if they are cached.
            progress: called with the number of files done since the last call.
        """
        # States before reading: if a file changes while it is read, its facts are not cached.
        states = {path: _state(path) for path in dict.fromkeys(paths)}
        known = {} if again else self._run(lambda database: self._read(database, kind, states))
        progress(len(known))
        missing = [path for path in states if path not in known]
        found: dict[Path, Facts] = {}
        written = time.monotonic()
        with _threads() as pool:
            for start in range(0, len(missing), _BATCH):
                chunk = missing[start : start + _BATCH]
                for path, facts in zip(chunk, pool.map(find_out, chunk), strict=True):
                    found[path] = facts
                    progress(1)
                    if time.monotonic() - written > _WRITE_EVERY_S:
                        self._remember(kind, states, found)
                        known |= found
                        found, written = {}, time.monotonic()
        self._remember(kind, states, found)
        return {
            path: {**facts, **({} if (state := states[path]) is None else state._asdict())}
            for path, facts in (known | found).items()
        }

    def _read(
        self, connection: sqlite3.Connection, kind: str, states: dict[Path, FileState | None]
    ) -> dict[Path, Facts]:
        """Facts about the files that look as they did."""
        by_name = {_name(path): path for path, state in states.items() if state is not None}
        with connection as database:
            # Two short queries: how many files are asked for does not change their number.
            database.execute("CREATE TEMP TABLE IF NOT EXISTS asked (path TEXT PRIMARY KEY)")
            database.execute("DELETE FROM asked")
            database.executemany("INSERT INTO asked VALUES (?)", ((name,) for name in by_name))
            rows = database.execute(
                "SELECT path, size, modified, facts, sum FROM asked CROSS JOIN known USING (path)"
                " WHERE kind = ?",
                (kind,),
            )
            return {
                by_name[name]: json.loads(facts)
                for name, size, modified, facts, checksum in rows
                if states[by_name[name]] == (size, modified)
                # SQLite has no checksums: a flipped bit in a size would crop an image elsewhere.
                and checksum == _sum(kind, name, size, modified, facts)
            }

    def _remember(
        self,
        kind: str,
        states: dict[Path, FileState | None],
        found: dict[Path, Facts],
    ) -> None:
        """Save facts, except those of files that failed or changed meanwhile."""
        # Failures are not cached: a permission or a disk may have been the reason.
        failed = [(kind, _name(path)) for path, facts in found.items() if "status" in facts]
        rows = [
            (kind, _name(path), *state, json.dumps(facts))
            for path, facts in found.items()
            if (state := states[path]) is not None
            and state == _state(path)  # it did not change while it was read
            and "status" not in facts
        ]
        summed = [(*row, _sum(*row)) for row in rows]
        self._run(lambda database: self._write(database, kind, failed, summed))

    def _write(
        self,
        connection: sqlite3.Connection,
        kind: str,
        failed: list[tuple[str, str]],
        rows: list[tuple[Any, ...]],
    ) -> None:
        with connection as database:
            database.executemany("DELETE FROM known WHERE kind = ? AND path = ?", failed)
            database.executemany("INSERT OR REPLACE INTO known VALUES (?, ?, ?, ?, ?, ?)", rows)

    def digest(self, path: Path, again: bool = False) -> str:
        """BLAKE3 of a file's content, in hexadecimal; see `look_up`."""
        whole = path.absolute()  # the cache is shared by processes in other working folders
        facts = self.look_up("digest", [whole], lambda p: {"digest": digest_file(p)}, again)
        return str(facts[whole]["digest"])

    def close(self) -> None:
        """Close the database."""
        if self._database is not None:
            self._database.close()

    def __enter__(self) -> "FactCache":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def fact_cache_of(cache_path: str | Path) -> FactCache:
    """Open the cache of facts in the folder of a store. Raises `OutputError`: see `FactCache`."""
    return FactCache(Path(cache_path) / FACTS)


def _is_busy(error: Exception) -> bool:
    """Whether an error says that another process holds the database."""
    code = getattr(error, "sqlite_errorcode", 0) & 0xFF
    return isinstance(error, Timeout) or code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)


def _is_damage(error: Exception) -> bool:
    """Whether an error says that the content of the database is wrong: one of names in its schema
    too, or, without a code, of text that is none."""
    if isinstance(error, OSError):
        return False
    code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR) & 0xFF
    return code in (sqlite3.SQLITE_ERROR, sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)


@contextmanager
def _threads() -> Generator[ThreadPoolExecutor]:
    """A pool with one thread per CPU. If an error or a signal ends the block, waiting tasks are
    cancelled and running ones are not waited for."""
    pool = ThreadPoolExecutor(os.cpu_count())
    try:
        yield pool
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        raise
    pool.shutdown()


def _sum(*row: object) -> str:
    """A checksum of a row. Damaged values may have any type."""
    return digest_text(json.dumps(row, separators=(",", ":"), default=repr))[:16]


def _name(path: Path) -> str:
    """A path as text that SQLite can store, even if its bytes are not UTF-8."""
    return str(path).encode("utf-8", "backslashreplace").decode("utf-8")


def _state(path: Path) -> FileState | None:
    """The state of a file; None if it does not exist."""
    try:
        return FileState.of(path)
    except (OSError, ValueError):  # ValueError: a null byte in the path
        return None


def _inode(path: Path) -> int | None:
    """The number of a file on its disk; None where there is none."""
    try:
        return path.stat().st_ino
    except FileNotFoundError:
        return None
