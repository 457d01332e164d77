"""Everything this project raises on purpose.

DiffSynthError
├── Stopped              the run was asked to stop; nothing is lost
└── UserError            a mistake that the person who started the run can mend
    ├── ParameterError   a flag, recipe key or run-config field
    ├── MetadataError    the metadata table, a row of it, or a file that a row names
    ├── WeightsError     a model file: missing, damaged, of an unknown kind, incomplete
    │   └── DownloadError    the hub did not answer or lacks the file; worth another try
    ├── TargetError      LoRA targets or trainable modules that match nothing
    ├── TrainingError    a training that went wrong by its parameters or data
    ├── StoreError       the cache of encoded samples
    ├── OutputError      a folder or file that cannot be written
    │   └── DamagedError     one that is not as it was written
    └── OutOfMemory      what a training takes does not fit into the memory

A broken invariant of ours is an `assert`, never one of these.
"""

import reprlib
from collections.abc import Iterable
from difflib import get_close_matches
from functools import partial

EXIT_USER_ERROR = 2


class DiffSynthError(Exception):
    """Root of the tree."""


class Stopped(DiffSynthError):
    """The run was asked to stop, between two steps or two batches.

    Args:
        args: what a person is told, if anything is to be said.
    """


class UserError(DiffSynthError):
    """A mistake of the person who started the run: what is wrong, where, what to do.

    What comes from files and names is part of that, and may hold control characters: they are
    escaped, so that a message is what it seems in a terminal too.

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
        """How it is pickled, on its way between processes: with its keyword arguments."""
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
    """A model hub did not answer, or lacks what was asked of it."""


class TargetError(UserError):
    """A LoRA target or a trainable module matches nothing."""


class TrainingError(UserError):
    """A training cannot go on: its parameters or its data led it astray."""


class StoreError(UserError):
    """The cache of encoded samples is missing, damaged, or lacks what was asked of it."""


class OutputError(UserError):
    """A folder or file cannot be written."""


class DamagedError(OutputError):
    """A folder or file of a run is not as it was written."""


class OutOfMemory(UserError):
    """What is asked for does not fit into the memory of the device, or of the machine."""


def printable(text: str) -> str:
    """A text with its control characters, and whatever else cannot be seen, escaped."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def is_text(text: str) -> bool:
    """Whether a text can be stored as UTF-8, and in what takes NUL for the end of a text."""
    return "\0" not in text and not any("\ud800" <= c <= "\udfff" for c in text)


_LARGEST = 10**4000
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 200


def shown(value: object) -> str:
    """A value as a message shows it: its representation, not long."""
    if isinstance(value, int) and abs(value) >= _LARGEST:
        return "a number of very many digits"  # which Python refuses to write down
    return _SHORT.repr(value)


def reason_of(error: BaseException) -> str:
    """What an error of a library says, in one line that is not long; its kind where it says
    nothing."""
    if isinstance(error, KeyError) and error.args:
        return f"missing: {error.args[0]}"
    text = " ".join(str(error).split())
    return f"{text[:400]}…" if len(text) > 400 else text or type(error).__name__


def nearest(name: str, known: Iterable[str], cutoff: float = 0.6) -> str:
    """A hint naming the entry of `known` nearest to `name`, or listing nothing when none is near.

    Args:
        cutoff: how alike they must be: 1 is the same. Above 0.9 one is the other but for a slip or two.
    """
    close = get_close_matches(name, list(known), n=1, cutoff=cutoff)
    return f"did you mean '{close[0]}'?" if close else ""
