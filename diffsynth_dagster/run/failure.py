"""`Failure`, the data of a failed training process: what happened, where, and what to do about it.

Failures go through files. The launcher names a folder in the environment variable `FAILURE_FOLDER`,
and a process that fails writes `failure-<process>.json` there. Dagster Pipes cannot do this: only
one process may use it, so a failure of another process, or one before Pipes is set up, would be
lost. A process started by hand has no such folder and prints the message. A killed process writes
nothing: it is noticed because its file `working-<process>`, written at its start, is still there.

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
# 128 + SIGINT, as shells report it.
EXIT_STOPPED = 130
_WORKING = "working-"
_PACKAGE = Path(__file__).parents[1]
# Folders of this project, of Python, and of installed packages. Other code is the user's.
_NOT_THE_USERS = (
    str(_PACKAGE),
    *(str(_PACKAGE.parent / name) for name in ("assets", "jobs", "resources")),
    *(sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")),
)
Kind = Literal["mistake", "crash", "stopped"]
_BY_IMPORTANCE: tuple[Kind, ...] = ("mistake", "crash", "stopped")


@dataclass(frozen=True)
class Failure(Event):
    """Why a process ended before its work was done.

    Args:
        kind: "mistake": a `UserError`; "stopped": it was asked to stop; "crash": anything else.
        what: one sentence that says what happened.
        where: the file and row, or the parameter, of a mistake; for a crash, the line of the user's
            code.
        do: what the user can do about a mistake.
        traceback: the traceback of a crash, including its causes. If the user's own code is in it,
            it begins there.
        may_retry: whether trying again may help although nothing was changed.
        process: the number of the process, from 0.
        processes: how many processes the training has on this machine.
        time: when it failed, in seconds since 1970.
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
    """Turn a library's error for a full disk or too little memory into a `UserError`. Other errors
    are returned unchanged."""
    return disk_error(error) or out_of_memory(error) or error


def failure_of(error: BaseException) -> Failure:
    """The `Failure` of this process for an error."""
    if isinstance(error, UserError):
        # Of all mistakes, only a failed download may go away by itself.
        retry = isinstance(error, DownloadError)
        failure = Failure("mistake", error.what, error.where, error.do, may_retry=retry)
    elif isinstance(error, (Stopped, KeyboardInterrupt)):
        failure = Failure("stopped", str(error) or "stopped")
    else:
        failure = _crash(error)
    process, count = process_number(), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return replace(failure, process=process, processes=count, time=time.time())


def process_number() -> int:
    """The rank of this process, as torchrun and `accelerate launch` set it; 0 without them."""
    return int(os.environ.get("RANK", "0"))


def _crash(error: BaseException) -> Failure:
    """The failure for a crash. Its traceback begins at the user's own code, if that is in it."""
    trace = traceback.TracebackException.from_exception(error)
    kind, reason, where = type(error).__name__, reason_of(error), None
    # The last error comes before its causes, so `where` is the user's line nearest to it.
    for part in _with_causes(trace):
        users = [i for i, frame in enumerate(part.stack) if _is_the_users(frame.filename)]
        if users:
            last = part.stack[users[-1]]
            where = where or f"{last.filename}, line {last.lineno}, in {last.name}"
            part.stack = traceback.StackSummary.from_list(part.stack[users[0] :])
    what = kind if reason == kind else f"{kind}: {reason}"
    return Failure("crash", what, where, traceback="".join(trace.format()).rstrip())


def _with_causes(
    trace: traceback.TracebackException,
) -> Iterator[traceback.TracebackException]:
    """A traceback and those of its causes, the last error first, as Python itself follows them."""
    yield trace
    cause = trace.__cause__ or (None if trace.__suppress_context__ else trace.__context__)
    if cause is not None:
        yield from _with_causes(cause)


def _is_the_users(file: str) -> bool:
    # Frozen modules and code from a string have names that are no absolute paths.
    return os.path.isabs(file) and not any(
        Path(file).is_relative_to(folder) for folder in _NOT_THE_USERS
    )


def read_failures(folder: Path) -> list[Failure]:
    """The failures that processes wrote into a folder, with the likely cause first.

    A mistake in one process can make others crash, and both make the launcher stop the rest. So
    mistakes come first, then crashes, then stopped processes; within a kind, the earliest first.
    """
    found = [
        Failure(**json.loads(path.read_text(encoding="utf-8")))
        for path in folder.glob("failure-*.json")
    ]
    return sorted(found, key=lambda failure: (_BY_IMPORTANCE.index(failure.kind), failure.time))


def working_file(folder: Path) -> Path:
    """The file that exists while this process works. Crashes of compiled code are written there."""
    return folder / f"{_WORKING}{process_number()}"


def read_silent(folder: Path) -> dict[int, str]:
    """The processes that ended without reporting: number → traceback of a crash in compiled code;
    an empty text for a process that was killed."""
    return {
        int(path.name.removeprefix(_WORKING)): path.read_text(errors="replace").strip()
        for path in sorted(folder.glob(f"{_WORKING}*"))
    }
