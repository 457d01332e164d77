"""Recognise errors about a lack of memory, whichever library raised them.

No heavy library is imported here, so that lack of memory can be reported even while these load.
"""

import errno
import re

from diffsynth_dagster.errors import OutOfMemory

_WORDS = (
    "out of memory",  # CUDA, MPS, XPU
    "can't allocate memory",  # torch on a CPU
    "not enough memory",  # the same on Windows
    "cannot allocate memory",  # the system
    "cublas_status_alloc_failed",
)
_UNITS = {"bytes": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
_ASKED = re.compile(rf"allocate ([\d.]+) ({'|'.join(_UNITS)})", re.IGNORECASE)


def says_short(error: BaseException | None) -> BaseException | None:
    """The error itself or one of its causes, if that reports a lack of memory; else None."""
    if error is None or isinstance(error, MemoryError):
        return error
    if isinstance(error, OSError) and error.errno == errno.ENOMEM:
        return error
    # Do not search the text of other errors: it may quote the content of a file.
    of_library = type(error).__module__.partition(".")[0] in ("torch", "safetensors")
    if of_library or type(error) is RuntimeError:
        text = str(error).lower()
        if any(word in text for word in _WORDS):
            return error
    return says_short(error.__cause__ or error.__context__)


def bytes_asked(error: BaseException) -> int | None:
    """How many bytes could not be allocated; None if the error does not say it."""
    match = _ASKED.search(str(error))
    if match is None:
        return None
    unit = next(size for name, size in _UNITS.items() if name.lower() == match[2].lower())
    return round(float(match[1]) * unit)


def size(count: float) -> str:
    """A number of bytes in a readable unit: `1.5 GiB`."""
    # The largest unit that is not larger than the number.
    name, unit = next((n, u) for n, u in reversed(_UNITS.items()) if count >= u or u == 1)
    return f"{count:.0f} bytes" if unit == 1 else f"{count / unit:.1f} {name}"


def out_of_memory(error: BaseException) -> OutOfMemory | None:
    """The error for the user if an error reports a lack of memory, without advice specific to the
    place where it happened; None for any other error, or one that is already an `OutOfMemory`."""
    cause = None if isinstance(error, OutOfMemory) else says_short(error)
    if cause is None:
        return None
    asked = bytes_asked(cause)
    more = f": {size(asked)} more were asked for" if asked is not None else ""
    return OutOfMemory(
        f"the memory is not enough{more}",
        do="end other programs that use it, or use a machine with more",
    )
