"""Clear a run folder for a new training: move the files of the earlier one to `older/`."""

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from diffsynth_dagster.errors import OutputError
from diffsynth_dagster.files import refusals, require_held
from diffsynth_dagster.older import MOVING, is_moving, move, older_runs, remove_older
from diffsynth_dagster.own_names import CHECKPOINT, is_trained
from diffsynth_dagster.run.folder import owned
from diffsynth_dagster.run.record import (
    FILE_NAME,
    LOGS,
    OLD_ROWS,
    PICTURES,
    REPORT,
    ROWS,
    RunRecord,
    read_record,
    written_files,
)
from diffsynth_dagster.run.resume_point import state_folders

Warn = Callable[[str], None]
_LEFT = "what an older training left"
# What an export writes. Promoted versions are not among it: they stay where they are.
_EXPORTED = (
    *("diffusers", "comfyui", "guide", "kohya", "peft", "authors"),
    *("README.md", "loss.svg", "exported.json"),
)
_EXPORTS = tuple(f"exports/{name}" for name in _EXPORTED)


def earlier_record(output: Path) -> RunRecord | None:
    """The record of the training in a run folder; None if it is missing or damaged."""
    try:
        return read_record(output)
    except OutputError:
        return None


def earlier_files(output: Path) -> set[str]:
    """The checkpoints and samples of the training in a run folder, as paths from that folder.

    They are taken from the record. If that is missing or damaged, they are recognised by their
    names.
    """
    record = earlier_record(output)
    if record is not None:
        return written_files(asdict(record))
    # Without a sign of a training, files with such names may be a person's own.
    if not _had_training(output):
        return set()
    paths = [*output.glob("*"), *(output / PICTURES).glob("*")]
    names = (path.relative_to(output).as_posix() for path in paths)
    return {name for name in names if is_trained(name)}


def _had_training(output: Path) -> bool:
    """Whether a run folder holds a training, with or without its record."""
    if is_moving(output):
        # The record is moved last: once it is there, the other files are too.
        return not (output / MOVING / FILE_NAME).is_file()
    signs = (output / FILE_NAME, output / LOGS[0])
    return bool(state_folders(output)) or any(path.is_file() for path in signs)


def finish_moving(output: Path, warn: Warn) -> None:
    """Finish a move that was killed, if there is one, and report it. Raises `OutputError`."""
    if is_moving(output):
        _move(output, warn)


def clear(output: Path, warn: Warn) -> None:
    """Move the training in a run folder to `older/`, with its states, samples and exports. A
    training without any checkpoint or state is removed instead.

    Raises:
        OutputError: something cannot be moved or removed.
    """
    record, states = earlier_record(output), state_folders(output)
    files = earlier_files(output)
    saved = any(CHECKPOINT.fullmatch(n) and (output / n).is_file() for n in files)
    # A finished training is kept even without checkpoints: its losses and samples may be of use.
    if saved or states or (record is not None and record.finished):
        _move(output, warn)
        return
    require_held(output)
    with refusals(f"{_LEFT} cannot be removed", output):
        for name in files | {*LOGS, ROWS, OLD_ROWS, REPORT}:
            (output / name).unlink(missing_ok=True)


def _move(output: Path, warn: Warn) -> None:
    """Move the training in a run folder to `older/`, and report it. Raises `OutputError`."""
    states = [path.relative_to(output).as_posix() for _, path in state_folders(output)]
    # `metrics.csv` last: it is one of the signs by which `_had_training` recognises a training.
    tables = (ROWS, OLD_ROWS, REPORT, *reversed(LOGS))
    names = [*sorted(earlier_files(output)), *_EXPORTS, *states, *tables]
    with refusals(f"{_LEFT} cannot be moved to older/", output):
        older = move(output, names)
    warn(f"{_description_of(older)} is now in {older}")


def _description_of(run: Path) -> str:
    """When an older training ended and how far it came, for a message."""
    record, states = earlier_record(run), state_folders(run)
    # The folder is named by the time at which the training ended.
    date, time = run.name[:19].split("T")
    when = f"of {date} {time.replace('-', ':')}"
    if record is None:
        return f"the training {when}, whose run.json is damaged or gone,"
    if record.finished:
        return f"the training {when}"
    progress = f"step {_steps(run)} of {record.total_steps}"
    kept = f"the newest state is that after step {states[0][0]}" if states else "without a state"
    return f"an unfinished training {when} ({progress}; {kept})"


def _steps(run: Path) -> int:
    """How many steps a training made, counted in its log."""
    path = run / LOGS[0]
    if not path.is_file():
        return 0
    with path.open("rb") as file:
        return max(0, sum(1 for _ in file) - 1)  # without the header


def drop_older(output: Path, keep: int | None, warn: Warn) -> None:
    """Remove all but the newest older trainings, and report each. One that cannot be removed is
    only reported: the new training is finished, and must not fail because of it.

    Args:
        keep: `runs_keep`; None keeps all.
    """
    runs = older_runs(output)
    for run in runs[:-keep] if keep is not None else []:
        try:
            # Locked: somebody may be exporting the older training.
            with owned(run, "removing it"), refusals(f"{_LEFT} cannot be removed", run):
                remove_older(run)
        except OutputError as error:
            warn(f"{run} stays, though runs_keep is {keep}: {error.what}")
        else:
            warn(f"{run} was removed: runs_keep is {keep}")
