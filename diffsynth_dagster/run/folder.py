"""A run folder has one owner at a time."""

import contextlib
import errno
import json
import os
import socket
from collections.abc import Generator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

from filelock import FileLock, Timeout

from diffsynth_dagster.errors import OutputError
from diffsynth_dagster.files import held, remove_leftovers, require_writable, write_text

LOCK, OWNER = ".lock", ".owner.json"
_WITHOUT_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EINVAL)
_WRITTEN = (
    *("", "samples", "state", "held_out", ".prompts", "exports", "exports/*", "exports/*/*"),
    *("older", ".tables", ".tables/held_out"),
)
"""The folders that an owner writes into."""


@contextmanager
def owned(folder: Path, doing: str) -> Generator[None]:
    """Hold a run folder, alone, and remove what killed writers left in it.

    Whoever removes or renames the folder meanwhile takes it away: then nothing is written any more (see
    `files.require_held`), also where another training made it anew. The lock is the operating system's, and ends with the process however that ends: after a crash
    nothing has to be removed by hand.

    Args:
        doing: what the owner does, for whoever is refused meanwhile.

    Raises:
        OutputError: someone else holds the folder; it cannot be written; or, by whatever writes into it in
            the block, it was taken away.
    """
    require_writable(folder, "output_path")
    lock = FileLock(folder / LOCK, blocking=False)
    try:
        lock.acquire()
    except Timeout:
        raise OutputError(
            f"the run folder is in use{_owner(folder)}",
            where=f"output_path = {folder}",
            do="wait until that is done, or give another output_path",
        ) from None
    except (OSError, NotImplementedError) as error:
        known = not isinstance(error, OSError) or error.errno in _WITHOUT_LOCKS
        raise OutputError(
            f"the run folder cannot be locked: {error}",
            where=f"output_path = {folder}" if known else str(folder / LOCK),
            do="give a folder on a file system that knows locks"
            if known
            else "remove it, if no training runs in that folder",
        ) from error
    path = (folder / LOCK).absolute()
    locked = path.stat()

    def check() -> None:
        if not _is(path, locked):
            raise OutputError(
                f"the run folder was removed or renamed while it was used for {doing}",
                where=f"output_path = {folder}",
                do="start it again, and leave the folder where it is meanwhile; nothing was written into "
                "what is at that path now",
            )

    try:
        with held(folder, check):
            for name in _WRITTEN:
                for place in folder.glob(name) if name else [folder]:
                    remove_leftovers(place)
            since = datetime.now().astimezone().isoformat(" ", "seconds")
            owner = {"doing": doing, "process": os.getpid(), "host": socket.gethostname()}
            write_text(folder / OWNER, json.dumps({**owner, "since": since}) + "\n")
            yield
    finally:
        if _is(path, locked):
            with contextlib.suppress(OSError):
                (folder / OWNER).unlink()
        lock.release()


def _is(path: Path, known: os.stat_result) -> bool:
    """Whether a path leads to a known file still, which is open and so keeps its number.

    Raises:
        OSError: that cannot be found out.
    """
    try:
        return os.path.samestat(path.stat(), known)
    except (FileNotFoundError, NotADirectoryError):
        return False


def _owner(folder: Path) -> str:
    """Who holds a folder, for a message; nothing where that cannot be read."""
    try:
        said = json.loads((folder / OWNER).read_text(encoding="utf-8"))
        return ": {doing} by process {process} on {host}, since {since}".format(**said)
    except (OSError, ValueError, KeyError, TypeError):
        return ""
