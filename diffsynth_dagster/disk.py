"""Turn errors of the file system into one kind of message, whichever library raised them.

Only Python's own errors have the system's error number (errno). safetensors and polars write it
into the text of their errors, and SQLite has error codes of its own.
"""

import errno
import re
import sqlite3

from diffsynth_dagster.errors import OutputError, UserError, reason_of

_AGAIN = "run it again: what was written before is whole, and is kept"
_FAILS = (
    "the disk, or the connection to it, fails",
    f"look into the system's log (dmesg), and when the disk is sound, {_AGAIN}",
)
_FORBIDDEN = (
    "permission denied",
    "let this user write there, or give another folder; a file may also be marked as immutable "
    "(lsattr shows it)",
)
_REFUSALS = {
    errno.ENOSPC: ("no space left on the disk", f"free some space and {_AGAIN}"),
    errno.EDQUOT: ("no space left in the disk quota", f"free some space and {_AGAIN}"),
    errno.EFBIG: (
        "the file is larger than its file system (FAT32: 4 GiB) or `ulimit -f` allows",
        "give a folder on another file system, or raise the limit",
    ),
    errno.EROFS: (
        "the file system can only be read",
        "give a folder that can be written; a disk that fails is made so by the system, whose log "
        "(dmesg) says it then",
    ),
    errno.EIO: _FAILS,
    errno.ESTALE: _FAILS,
    errno.EACCES: _FORBIDDEN,
    errno.EPERM: _FORBIDDEN,
}
"""errno → (what it means, what to do)."""
_OF_SQLITE = {
    sqlite3.SQLITE_FULL: errno.ENOSPC,
    sqlite3.SQLITE_READONLY: errno.EROFS,
    sqlite3.SQLITE_PERM: errno.EACCES,
    sqlite3.SQLITE_IOERR: errno.EIO,
}
"""SQLite's primary error code → errno."""
_WORDS = {"no space left": errno.ENOSPC, "disk quota exceeded": errno.EDQUOT}
_NUMBER = re.compile(r"\(os error (\d+)\)")
"""How libraries written in Rust print errno."""
_LIBRARIES = ("safetensors", "polars")


def _number(error: BaseException) -> int | None:
    """The errno of an error, without looking at its causes."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno
    if isinstance(error, sqlite3.Error):
        # The low 8 bits of an extended code are the primary one.
        return _OF_SQLITE.get(getattr(error, "sqlite_errorcode", 0) & 0xFF)
    # Do not search the text of other errors: it may quote the name of a file.
    if type(error).__module__.partition(".")[0] in _LIBRARIES or isinstance(error, OSError):
        text = str(error)
        match = _NUMBER.search(text)
        found = (number for words, number in _WORDS.items() if words in text.lower())
        return int(match[1]) if match is not None else next(found, None)
    return None


def _refused(error: BaseException | None) -> tuple[BaseException, int] | None:
    """Find an error of `_REFUSALS` among an error and its causes; returns it with its errno."""
    if error is None:
        return None
    number = _number(error)
    if number in _REFUSALS:
        return error, number
    return _refused(error.__cause__ or error.__context__)


def says_full(error: BaseException) -> bool:
    """Whether an error or one of its causes means that the disk or the quota is full."""
    refused = _refused(error)
    return refused is not None and refused[1] in (errno.ENOSPC, errno.EDQUOT)


def not_written(error: BaseException, where: str) -> OutputError | None:
    """The error for the user if writing a file failed in the operating system; else None.

    Args:
        error: what was raised while the file was written.
        where: the file.
    """
    refused = _refused(error)
    if refused is not None:
        what, do = _REFUSALS[refused[1]]
        why = f"{what}: {reason_of(refused[0])}"
    # Any other error of the system, even if it is not in the table.
    elif isinstance(error, OSError) or _number(error) is not None:
        why, do = reason_of(error), "check the folder's permissions and the disk"
    else:
        return None
    return OutputError(f"the file cannot be written: {why}", where=where, do=do)


def disk_error(error: BaseException) -> OutputError | None:
    """The error for the user if any error, or one of its causes, is one of `_REFUSALS`; else None.

    Unlike for `not_written`, the error may come from anywhere.
    """
    refused = None if isinstance(error, UserError) else _refused(error)
    if refused is None:
        return None
    cause, number = refused
    named = getattr(cause, "filename", None)
    what, do = _REFUSALS[number]
    # Without a file name, the permission may be about something else, such as a port.
    if (what, do) == _FORBIDDEN and not named:
        return None
    return OutputError(f"{what}: {reason_of(cause)}", where=str(named) if named else None, do=do)
