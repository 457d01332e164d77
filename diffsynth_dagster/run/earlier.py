"""The training that a run folder holds when another one begins there: what it wrote, and moving that to
`older/`."""

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from diffsynth_dagster.errors import OutputError
from diffsynth_dagster.files import refusals, require_held
from diffsynth_dagster.older import MOVING, is_moving, move, older_runs, remove_older
from diffsynth_dagster.own_names import CHECKPOINT, is_trained
from diffsynth_dagster.run.folder import owned
from diffsynth_dagster.run.goes_on import state_folders
from diffsynth_dagster.run.record import (
    FILE_NAME,
    LOGS,
    PICTURES,
    SAMPLE_LOSSES,
    RunRecord,
    read_record,
    written_files,
)

Warn = Callable[[str], None]
_LEFT = "what an older training left"
_EXPORTED = (
    *("diffusers", "comfyui", "guide", "kohya", "peft", "authors"),
    *("README.md", "loss.svg", "exported.json"),
)
_EXPORTS = tuple(f"exports/{name}" for name in _EXPORTED)


def earlier_record(output: Path) -> RunRecord | None:
    """The record of the training in a run folder; None where there is none, or it is damaged."""
    try:
        return read_record(output)
    except OutputError:
        return None


def earlier_files(output: Path) -> set[str]:
    """The checkpoints and samples that the training in a run folder wrote, as paths from there: by its
    record; by their names where that is damaged or gone."""
    record = earlier_record(output)
    if record is not None:
        return written_files(asdict(record))
    if not _had_training(output):
        return set()
    found = [*output.glob("*"), *(output / PICTURES).glob("*")]
    names = (path.relative_to(output).as_posix() for path in found)
    return {name for name in names if is_trained(name)}


def _had_training(output: Path) -> bool:
    """Whether a run folder holds a training, with its record or without."""
    if is_moving(output):
        return not (output / MOVING / FILE_NAME).is_file()  # which is moved last
    signs = (output / FILE_NAME, output / LOGS[0])
    return bool(state_folders(output)) or any(path.is_file() for path in signs)


def finish_moving(output: Path, warn: Warn) -> None:
    """Finish a move that was killed, if one was, and say where the training is. Raises `OutputError`."""
    if is_moving(output):
        _move(output, warn)


def clear(output: Path, warn: Warn) -> None:
    """Make a run folder empty of the training before, which is moved to `older/` with its states, samples
    and exports. One that came to no checkpoint and no state is removed.

    Raises:
        OutputError: something cannot be moved or removed.
    """
    record, states = earlier_record(output), state_folders(output)
    files = earlier_files(output)
    saved = any(CHECKPOINT.fullmatch(n) and (output / n).is_file() for n in files)
    if saved or states or (record is not None and record.finished):
        _move(output, warn)
        return
    require_held(output)
    with refusals(f"{_LEFT} cannot be removed", output):
        for name in files | {*LOGS, SAMPLE_LOSSES}:
            (output / name).unlink(missing_ok=True)


def _move(output: Path, warn: Warn) -> None:
    states = [path.relative_to(output).as_posix() for _, path in state_folders(output)]
    names = [*sorted(earlier_files(output)), *_EXPORTS, *states, SAMPLE_LOSSES, *reversed(LOGS)]
    with refusals(f"{_LEFT} cannot be moved to older/", output):
        place = move(output, names)
    warn(f"{_said_of(place)} is now in {place}")


def _said_of(run: Path) -> str:
    """How far an older training came, and when it ended: for a message."""
    record, states = earlier_record(run), state_folders(run)
    date, time = run.name[:19].split("T")
    when = f"of {date} {time.replace('-', ':')}"
    if record is None:
        return f"the training {when}, whose run.json is damaged or gone,"
    if record.finished:
        return f"the training {when}"
    come = f"step {_steps(run)} of {record.total_steps}"
    kept = f"the newest state is that after step {states[0][0]}" if states else "without a state"
    return f"an unfinished training {when} ({come}; {kept})"


def _steps(run: Path) -> int:
    """How many steps a training made, by its log."""
    path = run / LOGS[0]
    if not path.is_file():
        return 0
    with path.open("rb") as file:
        return max(0, sum(1 for _ in file) - 1)


def drop_older(output: Path, keep: int | None, warn: Warn) -> None:
    """Remove all but the newest older trainings, and say so. One that cannot be removed is named, and
    stays: the newest training is done.

    Args:
        keep: `runs_keep`.
    """
    runs = older_runs(output)
    for run in runs[:-keep] if keep is not None else []:
        try:
            with owned(run, "removing it"), refusals(f"{_LEFT} cannot be removed", run):
                remove_older(run)
        except OutputError as error:
            warn(f"{run} stays, though runs_keep is {keep}: {error.what}")
        else:
            warn(f"{run} was removed: runs_keep is {keep}")
