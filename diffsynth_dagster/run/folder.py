"""Lock a run folder, so that one process at a time writes into it."""

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
# The errors of a file system that has no locks, such as some network file systems.
_WITHOUT_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EINVAL)
# The folders that an owner writes into, as patterns.
_WRITTEN = (
    *(
        "",
        "samples",
        "state",
        "held_out",
        ".sampled",
        ".evaluated",
        "exports",
        "exports/*",
        "exports/*/*",
    ),
    *("older", ".tables", ".tables/held_out"),
)


@contextmanager
def owned(folder: Path, doing: str) -> Generator[None]:
    """Lock a run folder, and remove the hidden files that killed writers left in it.

    If a person removes or renames the folder meanwhile, nothing more is written (see
    `files.require_held`), even if another training has made a new folder at its path. The lock
    belongs to the operating system and ends with the process: after a crash, nothing has to be
    removed by hand.

    Args:
        doing: what the owner does, for the message that others get meanwhile.

    Raises:
        OutputError: the folder is in use, or cannot be written. Writers in the block raise it if
            the folder was removed or renamed.
    """
    require_writable(folder, "output_path")
    lock = _lock(folder)
    path = (folder / LOCK).absolute()
    # If another file is at this path later, the folder was replaced.
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
        # All writers of `files` call `check` before a write below this folder.
        with held(folder, check):
            # Under the lock nobody else writes here, so hidden files are leftovers.
            for name in _WRITTEN:
                for place in folder.glob(name) if name else [folder]:
                    remove_leftovers(place)
            since = datetime.now().astimezone().isoformat(" ", "seconds")
            owner = {"doing": doing, "process": os.getpid(), "host": socket.gethostname()}
            write_text(folder / OWNER, json.dumps({**owner, "since": since}) + "\n")
            yield
    finally:
        # Not in a folder that another training has made at this path.
        if _is(path, locked):
            with contextlib.suppress(OSError):
                (folder / OWNER).unlink()
        lock.release()


def _lock(folder: Path) -> FileLock:
    """Take the lock of a run folder.

    Raises:
        OutputError: the folder is in use, or cannot be locked.
    """
    # Refused at once, not after a wait: a training holds the lock for hours.
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
        unsupported = not isinstance(error, OSError) or error.errno in _WITHOUT_LOCKS
        raise OutputError(
            f"the run folder cannot be locked: {error}",
            where=f"output_path = {folder}" if unsupported else str(folder / LOCK),
            do="give a folder on a file system that knows locks"
            if unsupported
            else "remove it, if no training runs in that folder",
        ) from error
    return lock


def _is(path: Path, known: os.stat_result) -> bool:
    """Whether a path still leads to a known file.

    Raises:
        OSError: the path cannot be looked up.
    """
    # The inode tells: the lock file is kept open, so its inode is not given to a new file.
    try:
        return os.path.samestat(path.stat(), known)
    except (FileNotFoundError, NotADirectoryError):
        return False


def _owner(folder: Path) -> str:
    """Who has locked a folder, for a message; an empty text if that cannot be read."""
    try:
        owner = json.loads((folder / OWNER).read_text(encoding="utf-8"))
        return ": {doing} by process {process} on {host}, since {since}".format(**owner)
    except (OSError, ValueError, KeyError, TypeError):
        return ""
