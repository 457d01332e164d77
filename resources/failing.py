"""Errors that end a step or a run and show only their reason, without Dagster's own stack.

With each error that ends a step, Dagster stores and shows the stack at which it was raised. For a
user's mistake, a killed process or a cancel these are forty lines of Dagster's code around the
reason. Only a `DagsterUserCodeProcessError` is treated differently: it carries an error of another
process, which Dagster shows instead. The errors here derive from it. So they show their reason, and
a traceback only if they were given one.
"""

from typing import Any

import dagster as dg
from dagster._core.errors import DagsterUserCodeProcessError
from dagster_shared.error import SerializableErrorInfo

from diffsynth_dagster.config import TrainingConfig
from diffsynth_dagster.errors import UserError
from diffsynth_dagster.run.failure import Failure
from diffsynth_dagster.run.resume_point import resume_sentence


class StepFailure(DagsterUserCodeProcessError, dg.Failure):
    """Fails a step.

    Args:
        reason: the message: what happened, where, and what to do.
        traceback: the traceback to show, for a crash.
        allow_retries: whether a retry may help although nothing was changed.
    """

    def __init__(
        self, reason: str, traceback: str | None = None, *, allow_retries: bool = False
    ) -> None:
        self.traceback = traceback
        shown = _error_infos(self, reason, traceback)
        # The positional arguments are those of `dagster.Failure`: the first base class passes on
        # what is not its own.
        super().__init__(reason, None, allow_retries, user_code_process_error_infos=shown)

    @classmethod
    def of(cls, failure: Failure) -> "StepFailure":
        """The step failure for the failure of a training process, or of this process."""
        retry = failure.may_retry or failure.kind == "crash"
        return cls(str(failure), failure.traceback, allow_retries=retry)


class TriedAgain(DagsterUserCodeProcessError, dg.RetryRequested):
    """Makes Dagster retry a step after a failure.

    Args:
        failure: why the step failed.
        times: retries at most.
        delay: seconds before the retry.
    """

    def __init__(self, failure: StepFailure, times: int, delay: float) -> None:
        shown = _error_infos(self, failure.description or "", failure.traceback)
        super().__init__(times, delay, user_code_process_error_infos=shown)


class Cancelled(DagsterUserCodeProcessError, dg.DagsterExecutionInterruptedError):
    """The run was asked to stop.

    Args:
        reason: the message; empty if the stopped step has already reported it.
    """

    def __init__(self, reason: str = "") -> None:
        super().__init__(reason, user_code_process_error_infos=_error_infos(self, reason, None))


def cancelled(config: TrainingConfig | None = None) -> Cancelled:
    """The error of a step that was asked to stop.

    Args:
        config: the config of its processes, which have ended. The message then says from which
            state they continue.
    """
    again = "a training goes on from its newest state"
    if config is not None:
        again = resume_sentence(config)
    return Cancelled(
        str(
            UserError(
                "cancelled: the run was asked to stop, in the UI or by Ctrl-C",
                do=f"nothing is broken: run it again, and {again}",
            )
        )
    )


def _error_infos(error: BaseException, reason: str, traceback: str | None) -> list[Any]:
    """An error in the form in which Dagster stores and shows it."""
    # Dagster joins the lines of the stack, so that one text with all of them looks the same.
    stack = [] if traceback is None else [f"{traceback}\n"]
    return [SerializableErrorInfo(f"{reason}\n" if reason else "", stack, type(error).__name__)]
