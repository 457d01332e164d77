"""A cache of facts about files (digest, size in pixels, frames), by their path and state.

A file that looks unchanged is not read again. The cache lies beside the store and may be deleted at
any time: it is then written anew.
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
"""The cache's file in the folder of a store."""
Facts = dict[str, Any]
Progress = Callable[[int], object]
"""Called with the number of files done since the last call."""
_Result = TypeVar("_Result")
_BATCH = 1024
_PATIENCE_S, _LOOK_EVERY_S = 60.0, 1.0
"""While another process holds the database."""
_WRITE_EVERY_S = 5.0
"""What was found out is written down so often: an interrupted run loses no more."""
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
    return blake3(text.encode("utf-8", "surrogatepass")).hexdigest()


def digest_of(value: Any) -> str:
    """BLAKE3 of a JSON value in its canonical form: sorted keys, no spaces."""
    return digest_text(json.dumps(value, sort_keys=True, separators=(",", ":")))


class FileState(NamedTuple):
    """What shows, without reading a file, that it is the one that it was.

    Attributes:
        size: bytes.
        modified: a number that stands for when it was modified and replaced last. The time of
            modification alone does not tell: programs that copy set it to that of the original.
    """

    size: int
    modified: int

    @classmethod
    def of(cls, path: Path) -> "FileState":
        """The state of a file. Raises `OSError` where there is none."""
        stat = path.stat()
        # The time of its last change and its place on the disk, which no program sets.
        marks = f"{stat.st_mtime_ns} {stat.st_ctime_ns} {stat.st_ino}"
        return cls(stat.st_size, int(digest_text(marks)[:15], 16))


class FactCache:
    """A table from files to facts about them, closed at the end of a `with` block. Safe for several
    processes at once."""

    def __init__(self, path: Path) -> None:
        """Open or make the cache at `path`.

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
                do=f"wait until it is done, or end it (`fuser {self._path}` says which it is), and run "
                "this again",
            )
        return OutputError(
            f"the cache of facts about files cannot be used: {error}",
            where=str(self._path),
            do="give a cache_path that can be written, on a disk with space left; the cache itself may "
            "be deleted",
        )

    def _run(self, work: Callable[[sqlite3.Connection], _Result]) -> _Result:
        """Do something with the database: again while another process holds it, for a minute (SQLite
        itself would wait without hearing a signal), and once more in a new one where it is damaged.

        Raises:
            OutputError: it cannot be read or written.
        """
        began, is_new = time.monotonic(), False
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
        """Facts about each file, found out (in threads) only where the file changed.

        Each file's facts also say which state of the file they are about: `size` and `modified` of
        its `FileState` (missing for no file).

        Args:
            kind: what the facts are about; each kind is remembered by itself.
            find_out: file → facts, values of JSON; must not raise for a bad file.
            again: find out again whatever is remembered.
            progress: called with the number of files done since the last call.
        """
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
                for name, size, modified, facts, check in rows
                if states[by_name[name]] == (size, modified)
                # SQLite has no checksums: a picture would be cropped at another place.
                and check == _sum(kind, name, size, modified, facts)
            }

    def _remember(
        self,
        kind: str,
        states: dict[Path, FileState | None],
        found: dict[Path, Facts],
    ) -> None:
        # What failed is looked at again: a permission or a disk may have been the reason.
        failed = [(kind, _name(path)) for path, facts in found.items() if "status" in facts]
        rows = [
            (kind, _name(path), *state, json.dumps(facts))
            for path, facts in found.items()
            if (state := states[path]) is not None
            and state == _state(path)
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
        """BLAKE3 of a file's content; see `look_up`."""
        whole = path.absolute()
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
    """The cache of facts in the folder of a store, which `cache_path` names. Raises `OutputError`: see
    `FactCache`."""
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
    """As many threads as CPUs. Where an error or a signal ends the block, nothing more is begun, and what
    runs is not waited for."""
    pool = ThreadPoolExecutor(os.cpu_count())
    try:
        yield pool
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        raise
    pool.shutdown()


def _sum(*row: object) -> str:
    """A checksum of a row, whatever damage made of its values."""
    return digest_text(json.dumps(row, separators=(",", ":"), default=repr))[:16]


def _name(path: Path) -> str:
    """A path as text, also where its bytes are none."""
    return str(path).encode("utf-8", "backslashreplace").decode("utf-8")


def _state(path: Path) -> FileState | None:
    """The state of a file; None where there is none."""
    try:
        return FileState.of(path)
    except (OSError, ValueError):
        return None


def _inode(path: Path) -> int | None:
    """The number of a file on its disk; None where there is none."""
    try:
        return path.stat().st_ino
    except FileNotFoundError:
        return None
