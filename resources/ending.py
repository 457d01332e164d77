"""Turns the end of training processes into the failure of their step, with what to do about it."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from diffsynth_dagster.config import TrainingConfig
from diffsynth_dagster.errors import UserError
from diffsynth_dagster.run.failure import EXIT_STOPPED, read_failures, read_silent
from diffsynth_dagster.run.resume_point import newest_step, resume_sentence
from resources.failing import StepFailure

_KILLED = (
    "if nobody killed it, the system did, for want of memory (`dmesg` says so): give it more, or "
    "lower batch_size or dataset_num_workers. Then "
)


def require_success(
    code: int | None, folder: Path, last_words: Callable[[], str], config: TrainingConfig
) -> None:
    """Raise a `StepFailure` with what the processes reported, unless they succeeded.

    Args:
        code: exit code of the command.
        folder: where the processes report failures; see `run.failure`.
        last_words: returns the end of their standard error, if none of them could report.
        config: the config of the processes.

    Raises:
        StepFailure: they did not succeed.
    """
    if code == 0:
        return
    task = config.task
    failures, silent = read_failures(folder), read_silent(folder)
    first = failures[0] if failures else None
    if first is not None and first.kind == "mistake":
        raise StepFailure.of(first)
    # Only if every process reports that it was stopped. If one reported nothing, it may have been
    # killed, and the others were stopped because of that.
    stopped = first is not None and first.kind == "stopped" and len(failures) == first.processes
    if code == EXIT_STOPPED or stopped:
        raise StepFailure(_message(f"{task} was stopped by a signal", None, _go_on(config)))
    if first is not None and first.kind == "crash":
        if newest_step(Path(config.output_path)) is not None:
            first = replace(first, do=f"when the cause is gone, {_go_on(config)}")
        raise StepFailure.of(first)
    if silent:
        raise _silent_failure(silent, config)
    # No process came as far as to register itself: the command line or the environment is wrong.
    what = f"{task} could not be launched: exit code {code}"
    raise StepFailure(what, last_words() or None, allow_retries=True)


def _silent_failure(silent: Mapping[int, str], config: TrainingConfig) -> StepFailure:
    """The failure of processes that died without a report.

    Args:
        silent: process → its traceback in compiled code, or an empty text; see `read_silent`.
    """
    for process, trace in silent.items():
        if trace:
            what = f"process {process} of {config.task} crashed in compiled code: {trace.splitlines()[0]}"
            return StepFailure(what, trace, allow_retries=True)
    who = ", ".join(str(process) for process in silent)
    return StepFailure(
        _message(
            f"{config.task} was killed by a signal from outside",
            f"process {who}, in {Path(config.output_path).absolute()}",
            _KILLED + _go_on(config),
        ),
        allow_retries=True,
    )


def took_too_long(told: str, config: TrainingConfig) -> StepFailure:
    """The failure of processes that were stopped because the run's time was up.

    Args:
        told: the first part of the message: what took too long.
    """
    do = f"allow more in the recipe's 'tags', or {_go_on(config)}"
    return StepFailure(_message(told, None, do))


def _go_on(config: TrainingConfig) -> str:
    return f"run it again: {resume_sentence(config)}"


def _message(what: str, where: str | None, do: str) -> str:
    return str(UserError(what, where=where, do=do))
