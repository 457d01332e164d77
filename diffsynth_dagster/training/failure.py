"""How a training process fails, as data: what happened, where, and what to do about it.

One way serves every process of a training and every moment of it: whoever launches the processes
names a folder in the environment variable `FAILURE_FOLDER`, and a process that fails writes
`failure-<process>.json` there. Dagster Pipes cannot do that: one process alone may speak through
it, and a mistake on another one, or one found before anything is set up, would be lost. A process
started by hand has no such folder and prints the message.

Nothing heavy is imported here, so that a failure to import something can be reported too.
"""

import json
import os
import time
import traceback
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from diffsynth_dagster.errors import (
    DownloadError,
    Stopped,
    UserError,
)

FAILURE_FOLDER = "DIFFSYNTH_FAILURE_FOLDER"
EXIT_STOPPED = 130
Kind = Literal["mistake", "crash", "stopped"]
_BY_IMPORTANCE: tuple[Kind, ...] = ("mistake", "crash", "stopped")


@dataclass(frozen=True)
class Failure:
    """Why one process ended before its work was done.

    Args:
        kind: "mistake": a `UserError`; "stopped": asked to stop; "crash": anything else.
        what: one sentence that says what happened.
        where: the file and row, or the parameter, of a mistake.
        do: what to do about a mistake.
        traceback: of a crash, with those of the errors that led to it.
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


def failure_of(error: BaseException) -> Failure:
    """The failure that an error means for this process."""
    if isinstance(error, UserError):
        retry = isinstance(error, DownloadError)
        failure = Failure("mistake", error.what, error.where, error.do, may_retry=retry)
    elif isinstance(error, (Stopped, KeyboardInterrupt)):
        failure = Failure("stopped", "stopped between two steps")
    else:
        what = "".join(traceback.format_exception_only(error)).strip()
        text = "".join(traceback.format_exception(error))
        failure = Failure("crash", what, traceback=text)
    # torchrun and `accelerate launch` set these when there are several processes.
    process, count = int(os.environ.get("RANK", "0")), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return replace(failure, process=process, processes=count, time=time.time())


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
