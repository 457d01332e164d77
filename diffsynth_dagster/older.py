"""The older trainings of a run folder.

When a new training begins, the one before it is moved into a folder below `older/`, which has the
layout of a run folder.

    older/2026-11-30T01-52-07/  an older training, named by the time at which it ended
    .older/                     a training that is being moved there
    .tables/                    hard links to the tables of the newest training: the tables in the
                                run folder are replaced before the next training begins

Files are renamed, not copied, except for `config.yaml`.
"""

import shutil
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from diffsynth_dagster.files import hidden_beside, link_whole, remove, require_held
from diffsynth_dagster.own_names import OLDER

FOLDER, MOVING, TABLES = "older", ".older", ".tables"
_CHECKED, _PINNED = "metadata.parquet", ".metadata.encoded.parquet"
_TABLES = (_CHECKED, "rejected.csv", "samples.parquet", "long_captions.parquet")
_KEPT = (*_TABLES, *(f"held_out/{name}" for name in _TABLES))
_RECORD, _CONFIG, _METRICS = "run.json", "config.yaml", "metrics.csv"


def older_runs(folder: Path) -> list[Path]:
    """The folders of the older trainings of a run folder, the oldest first."""

    def age(path: Path) -> tuple[str, int]:
        ended, number = path.name[:19], path.name[20:]  # trainings of the same second: -2, -3, …
        return ended, int(number or 1)

    paths = (folder / FOLDER).glob("*")
    runs = (p for p in paths if OLDER.fullmatch(f"{FOLDER}/{p.name}") and p.is_dir())
    return sorted(runs, key=age)


def keep_tables(folder: Path, encoded_in: Path) -> None:
    """Link the tables that a training begins with into `.tables/`, so that they are still there
    when the next data set has replaced the ones in the run folder.

    Args:
        encoded_in: the folder in which the data set was encoded. If it is not the run folder, its
            tables are not kept here.

    Raises:
        OutputError: the folder cannot be written.
    """
    is_own = encoded_in.resolve() == folder.resolve()
    for name in _KEPT:
        table, kept = folder / name, folder / TABLES / name
        if table.name == _CHECKED and table.with_name(_PINNED).is_file():
            # The table that was encoded: `metadata.parquet` may have been checked again since.
            table = table.with_name(_PINNED)
        if is_own and table.is_file():
            link_whole(table, kept)
        else:
            kept.unlink(missing_ok=True)


def is_moving(folder: Path) -> bool:
    """Whether a move to `older/` was begun in a run folder and not finished."""
    return (folder / MOVING).is_dir()


def move(folder: Path, names: Iterable[str]) -> Path:
    """Move a training of a run folder to `older/`; returns its new folder.

    If this is killed, calling it again finishes the move.

    Args:
        names: the files and folders of the training, as paths from the run folder. Missing ones are
            skipped.

    Raises:
        OSError: something cannot be moved. What was moved before stays moved.
    """
    require_held(folder)
    staged = folder / MOVING
    staged.mkdir(exist_ok=True)
    for name in names:
        _rename(folder / name, staged / name)
    for name in _KEPT:
        _rename(folder / TABLES / name, staged / name)
    if (folder / _CONFIG).is_file() and not (staged / _RECORD).exists():
        # A copy: the running command may have been given this file as its recipe.
        shutil.copyfile(folder / _CONFIG, staged / _CONFIG)
    # The record last: after a kill, the names of the other files are taken from it again.
    _rename(folder / _RECORD, staged / _RECORD)
    for name in (f"{TABLES}/held_out", TABLES, "state", "samples", "exports"):
        with suppress(OSError):  # it is missing, or not empty because of files that are not ours
            (folder / name).rmdir()
    place = _free_name(folder, staged)
    place.parent.mkdir(exist_ok=True)
    return staged.rename(place)


def _rename(path: Path, other: Path) -> None:
    if path.exists():
        other.parent.mkdir(parents=True, exist_ok=True)
        # A rename replaces a file, but not a folder that has files: one of a move that was killed.
        if other.is_dir():
            remove(other)
        path.replace(other)


def _free_name(folder: Path, moved: Path) -> Path:
    """The folder that a training is moved to, named by the local time at which it wrote its record
    or its log last."""
    logs = [moved / name for name in (_RECORD, _METRICS)]
    times = [path.stat().st_mtime for path in logs if path.is_file()] or [time.time()]
    place = folder / FOLDER / time.strftime("%Y-%m-%dT%H-%M-%S", time.localtime(max(times)))
    number = 1
    while place.exists():
        number += 1
        place = place.with_name(f"{place.name[:19]}-{number}")
    return place


def remove_older(run: Path) -> None:
    """Remove an older training. Raises `OSError`."""
    # Renamed first: a half-removed folder must not look like a training.
    hidden = hidden_beside(run)
    shutil.rmtree(run.rename(hidden))
