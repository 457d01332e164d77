"""Errors that end a step, or a run, in words of their own.

With an error that ends a step Dagster keeps the stack on which it was raised. Of a mistake, of a
process that was killed and of a cancel this is forty lines of Dagster's own code, which stand on the
run's page below (or above) the reason. Dagster itself shows another process's error as that process
told it, through `DagsterUserCodeProcessError`: the errors here are such ones. Their reason comes
first, and a traceback is there only where they were given one.
"""

from typing import Any

import dagster as dg
from dagster._core.errors import DagsterUserCodeProcessError
from dagster_shared.error import SerializableErrorInfo

from diffsynth_dagster.config import TrainingConfig
from diffsynth_dagster.errors import UserError
from diffsynth_dagster.run.failure import Failure
from diffsynth_dagster.run.goes_on import say_where_it_goes_on


class StepFailure(DagsterUserCodeProcessError, dg.Failure):
    """What fails a step.

    Args:
        reason: what a person reads first: what happened, where, and what to do.
        traceback: of a crash.
        allow_retries: whether trying the step again may help although nothing was changed.
    """

    def __init__(
        self, reason: str, traceback: str | None = None, *, allow_retries: bool = False
    ) -> None:
        self.traceback = traceback
        told = _told(self, reason, traceback)
        # `dagster.Failure` is behind the other class, which passes on what is not its own.
        super().__init__(reason, None, allow_retries, user_code_process_error_infos=told)

    @classmethod
    def of(cls, failure: Failure) -> "StepFailure":
        """The failure of a process, or of this one."""
        retry = failure.may_retry or failure.kind == "crash"
        return cls(str(failure), failure.traceback, allow_retries=retry)


class TriedAgain(DagsterUserCodeProcessError, dg.RetryRequested):
    """Lets Dagster try a step again after a failure.

    Args:
        delay: before that, in seconds.
    """

    def __init__(self, failure: StepFailure, times: int, delay: float) -> None:
        told = _told(self, failure.description or "", failure.traceback)
        super().__init__(times, delay, user_code_process_error_infos=told)


class Cancelled(DagsterUserCodeProcessError, dg.DagsterExecutionInterruptedError):
    """The run was asked to stop.

    Args:
        reason: left out where the step that was stopped has said it already.
    """

    def __init__(self, reason: str = "") -> None:
        super().__init__(reason, user_code_process_error_infos=_told(self, reason, None))


def cancelled(config: TrainingConfig | None = None) -> Cancelled:
    """What a step that is asked to stop ends with.

    Args:
        config: of its processes, which have ended.
    """
    again = "a training goes on from its newest state"
    if config is not None:
        again = say_where_it_goes_on(config)
    return Cancelled(
        str(
            UserError(
                "cancelled: the run was asked to stop, in the UI or by Ctrl-C",
                do=f"nothing is broken: run it again, and {again}",
            )
        )
    )


def _told(error: BaseException, reason: str, traceback: str | None) -> list[Any]:
    """How Dagster keeps an error."""
    stack = [] if traceback is None else [f"{traceback}\n"]
    return [SerializableErrorInfo(f"{reason}\n" if reason else "", stack, type(error).__name__)]
