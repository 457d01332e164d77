"""All exceptions that this project raises on purpose.

DiffSynthError
├── Stopped              the run was asked to stop; nothing is lost
└── UserError            a mistake that the person who started the run can correct
    ├── ParameterError   a flag, recipe key or run-config field
    ├── MetadataError    the metadata table, one of its rows, or a file that a row names
    ├── WeightsError     a model file: missing, damaged, of an unknown kind, incomplete
    │   └── DownloadError    the hub did not answer or lacks the file; trying again may help
    ├── TargetError      LoRA targets or trainable modules that match nothing
    ├── TrainingError    a training that failed because of its parameters or data
    ├── StoreError       the cache of encoded samples
    ├── OutputError      a folder or file that cannot be written
    │   └── DamagedError     a folder or file whose content has changed since it was written
    └── OutOfMemory      there is not enough memory for what a training needs

Invariants of the code are checked with `assert` instead.
"""

import reprlib
from collections.abc import Iterable
from difflib import get_close_matches
from functools import partial

EXIT_USER_ERROR = 2


class DiffSynthError(Exception):
    """Base class of this project's exceptions."""


class Stopped(DiffSynthError):
    """The run was asked to stop, between two steps or two batches.

    Args:
        args: a message for the user, if there is something to say.
    """


class UserError(DiffSynthError):
    """A mistake of the person who started the run: what is wrong, where, and what to do.

    Unprintable characters are escaped: texts quote file names and contents, and control characters
    in them could change what a terminal shows.

    Args:
        what: one sentence that says what is wrong.
        where: the file and row, or the parameter.
        do: what to do about it.
    """

    def __init__(self, what: str, *, where: str | None = None, do: str | None = None) -> None:
        self.what = printable(what)
        self.where = None if where is None else printable(where)
        self.do = None if do is None else printable(do)
        super().__init__(self.what, self.where, self.do)

    def __reduce__(self) -> tuple[partial["UserError"], tuple[str]]:
        """Pickle the error, to pass it between processes."""
        # By default, exceptions are rebuilt from `args` alone, without keyword arguments.
        return partial(type(self), where=self.where, do=self.do), (self.what,)

    def __str__(self) -> str:
        lines = [self.what]
        if self.where:
            lines.append(f"  where: {self.where}")
        if self.do:
            lines.append(f"  what to do: {self.do}")
        return "\n".join(lines)


class ParameterError(UserError):
    """A flag, a recipe key or a run-config field is unknown or has a value it cannot take."""


class MetadataError(UserError):
    """The metadata table, a row of it, or a file that a row names is unusable."""


class WeightsError(UserError):
    """A model file is missing, damaged, incomplete, or of an unknown kind."""


class DownloadError(WeightsError):
    """A model hub did not answer, or does not have the requested file."""


class TargetError(UserError):
    """A LoRA target or a trainable module matches nothing."""


class TrainingError(UserError):
    """A training cannot continue because of its parameters or its data."""


class StoreError(UserError):
    """The cache of encoded samples is missing or damaged, or lacks a requested sample."""


class OutputError(UserError):
    """A folder or file cannot be written."""


class DamagedError(OutputError):
    """A folder or file of a run has changed since it was written."""


class OutOfMemory(UserError):
    """There is not enough memory on the device or the machine."""


def printable(text: str) -> str:
    """Escape control characters and other unprintable characters in a text."""
    if text.isprintable():
        return text
    # `ascii` adds quotes; [1:-1] removes them.
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def is_text(text: str) -> bool:
    """Whether a text can be stored as UTF-8, and in formats that end a text at the first NUL."""
    # Python reads undecodable bytes of a file name as lone surrogates.
    return "\0" not in text and not any("\ud800" <= c <= "\udfff" for c in text)


_LARGEST = 10**4000
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 200


def shown(value: object) -> str:
    """The representation of a value for a message, shortened if it is long."""
    if isinstance(value, int) and abs(value) >= _LARGEST:
        return "a number of very many digits"  # Python refuses to convert it to a string
    return _SHORT.repr(value)


def reason_of(error: BaseException) -> str:
    """The message of a library's error in one line of at most 400 characters, or its class name if
    it has no message."""
    if isinstance(error, KeyError) and error.args:  # its message is only the key
        return f"missing: {error.args[0]}"
    text = " ".join(str(error).split())
    return f"{text[:400]}…" if len(text) > 400 else text or type(error).__name__


def nearest(name: str, known: Iterable[str], cutoff: float = 0.6) -> str:
    """A hint such as "did you mean 'prompt'?" with the entry of `known` most similar to `name`;
    empty if none is similar.

    Args:
        cutoff: the least similarity; 1 means equal. At 0.9, names differ by a typing error or two.
    """
    close = get_close_matches(name, list(known), n=1, cutoff=cutoff)
    return f"did you mean '{close[0]}'?" if close else ""
