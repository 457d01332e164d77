"""How a training process fails, as data: what happened, where, and what to do about it.

One way serves every process of a training and every moment of it: whoever launches the processes
names a folder in the environment variable `FAILURE_FOLDER`, and a process that fails writes
`failure-<process>.json` there. Dagster Pipes cannot do that: one process alone may speak through
it, and a mistake on another one, or one found before anything is set up, would be lost. A process
started by hand has no such folder and prints the message. A process that is killed writes nothing:
it is told by the file `working-<process>` that it made when it began and never removed.

Nothing heavy is imported here, so that a failure to import something can be reported too.
"""

import json
import os
import sysconfig
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from diffsynth_dagster.disk import disk_error
from diffsynth_dagster.errors import (
    DownloadError,
    Stopped,
    UserError,
    reason_of,
)
from diffsynth_dagster.run.events import Event
from diffsynth_dagster.shortage import out_of_memory

FAILURE_FOLDER = "DIFFSYNTH_FAILURE_FOLDER"
EXIT_STOPPED = 130
_WORKING = "working-"
_PACKAGE = Path(__file__).parents[1]
_NOT_THE_USERS = (
    str(_PACKAGE),
    *(str(_PACKAGE.parent / name) for name in ("assets", "jobs", "resources")),
    *(sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")),
)
"""Folders of this project, of Python, and of installed packages."""
Kind = Literal["mistake", "crash", "stopped"]
_BY_IMPORTANCE: tuple[Kind, ...] = ("mistake", "crash", "stopped")


@dataclass(frozen=True)
class Failure(Event):
    """A process ended before its work was done: why.

    Args:
        kind: "mistake": a `UserError`; "stopped": asked to stop; "crash": anything else.
        what: one sentence that says what happened.
        where: the file and row, or the parameter, of a mistake.
        do: what to do about a mistake.
        traceback: of a crash, with those of the errors that led to it. Of an error in the user's own
            code it begins with that code.
        may_retry: trying again may help although nothing was changed.
        process: number of the process, from 0.
        processes: how many processes the training has on this machine.
        time: seconds since 1970.
    """

    kind: Kind
    what: str
    where: str | None = None
    do: str | None = None
    traceback: str | None = None
    may_retry: bool = False
    process: int = 0
    processes: int = 1
    time: float = 0.0

    def __str__(self) -> str:
        return str(UserError(self.what, where=self.where, do=self.do))


def recognised(error: BaseException) -> BaseException:
    """The mistake that an error of a library stands for, such as a full disk or too little memory; any
    other error as it is."""
    return disk_error(error) or out_of_memory(error) or error


def failure_of(error: BaseException) -> Failure:
    """The failure that an error means for this process."""
    if isinstance(error, UserError):
        retry = isinstance(error, DownloadError)
        failure = Failure("mistake", error.what, error.where, error.do, may_retry=retry)
    elif isinstance(error, (Stopped, KeyboardInterrupt)):
        failure = Failure("stopped", str(error) or "stopped")
    else:
        failure = _crash(error)
    process, count = process_number(), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return replace(failure, process=process, processes=count, time=time.time())


def process_number() -> int:
    """The number of this process, which torchrun and `accelerate launch` set where there are
    several."""
    return int(os.environ.get("RANK", "0"))


def _crash(error: BaseException) -> Failure:
    told = traceback.TracebackException.from_exception(error)
    kind, reason, where = type(error).__name__, reason_of(error), None
    for each in _with_what_led_to_it(told):
        own = [i for i, frame in enumerate(each.stack) if _is_the_users(frame.filename)]
        if own:
            last = each.stack[own[-1]]
            where = where or f"{last.filename}, line {last.lineno}, in {last.name}"
            each.stack = traceback.StackSummary.from_list(each.stack[own[0] :])
    what = kind if reason == kind else f"{kind}: {reason}"
    return Failure("crash", what, where, traceback="".join(told.format()).rstrip())


def _with_what_led_to_it(
    told: traceback.TracebackException,
) -> Iterator[traceback.TracebackException]:
    yield told
    before = told.__cause__ or (None if told.__suppress_context__ else told.__context__)
    if before is not None:
        yield from _with_what_led_to_it(before)


def _is_the_users(file: str) -> bool:
    return os.path.isabs(file) and not any(
        Path(file).is_relative_to(folder) for folder in _NOT_THE_USERS
    )


def read_failures(folder: Path) -> list[Failure]:
    """The failures that processes wrote into a folder, the cause of the others first.

    A mistake explains a crash, and both explain why the other processes were stopped; among equals
    the earliest comes first.
    """
    found = [
        Failure(**json.loads(path.read_text(encoding="utf-8")))
        for path in folder.glob("failure-*.json")
    ]
    return sorted(found, key=lambda failure: (_BY_IMPORTANCE.index(failure.kind), failure.time))


def working_file(folder: Path) -> Path:
    """The file that this process has while it works. What breaks in compiled code is written there."""
    return folder / f"{_WORKING}{process_number()}"


def read_silent(folder: Path) -> dict[int, str]:
    """The processes that ended without a word: number → what their compiled code broke with, or an
    empty text, of one that was killed."""
    return {
        int(path.name.removeprefix(_WORKING)): path.read_text(errors="replace").strip()
        for path in sorted(folder.glob(f"{_WORKING}*"))
    }
