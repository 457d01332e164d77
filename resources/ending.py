"""How training processes ended, as the failure of their step."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from diffsynth_dagster.config import TrainingConfig
from diffsynth_dagster.errors import UserError
from diffsynth_dagster.run.failure import EXIT_STOPPED, read_failures, read_silent
from diffsynth_dagster.run.goes_on import newest_step, say_where_it_goes_on
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
        folder: where they report; see `run.failure`.
        last_words: the end of their standard error, where none of them came as far as to report.
    """
    if code == 0:
        return
    task = config.task
    failures, silent = read_failures(folder), read_silent(folder)
    first = failures[0] if failures else None
    if first is not None and first.kind == "mistake":
        raise StepFailure.of(first)
    # With a process that reported nothing, the others may have been stopped because it was killed.
    stopped = first is not None and first.kind == "stopped" and len(failures) == first.processes
    if code == EXIT_STOPPED or stopped:
        raise StepFailure(_said(f"{task} was stopped by a signal", None, _go_on(config)))
    if first is not None and first.kind == "crash":
        if newest_step(Path(config.output_path)) is not None:
            first = replace(first, do=f"when the cause is gone, {_go_on(config)}")
        raise StepFailure.of(first)
    if silent:
        raise _silent_failure(silent, config)
    what = f"{task} could not be launched: exit code {code}"
    raise StepFailure(what, last_words() or None, allow_retries=True)


def _silent_failure(silent: Mapping[int, str], config: TrainingConfig) -> StepFailure:
    """The failure of processes that reported nothing.

    Args:
        silent: see `read_silent`.
    """
    for process, trace in silent.items():
        if trace:
            what = f"process {process} of {config.task} crashed in compiled code: {trace.splitlines()[0]}"
            return StepFailure(what, trace, allow_retries=True)
    who = ", ".join(str(process) for process in silent)
    return StepFailure(
        _said(
            f"{config.task} was killed by a signal from outside",
            f"process {who}, in {Path(config.output_path).absolute()}",
            _KILLED + _go_on(config),
        ),
        allow_retries=True,
    )


def took_too_long(told: str, config: TrainingConfig) -> StepFailure:
    """The failure of processes that were stopped when the time of their run was over.

    Args:
        told: what a person reads: how much time that was.
    """
    return StepFailure(_said(told, None, f"allow more in the recipe's 'tags', or {_go_on(config)}"))


def _go_on(config: TrainingConfig) -> str:
    return f"run it again: {say_where_it_goes_on(config)}"


def _said(what: str, where: str | None, do: str) -> str:
    return str(UserError(what, where=where, do=do))
