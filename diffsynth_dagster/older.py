"""The trainings that a run folder held before the newest one. Each lies whole in a folder that is a run
folder itself.

    older/2026-11-30T01-52-07/  named by the time at which it ended
    .older/                     the one that is being moved there
    .tables/                    the tables of the newest training, under second names: those of the run
                                folder are replaced before the next training begins

Files are renamed and not copied, but for `config.yaml`.
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

    def place(path: Path) -> tuple[str, int]:
        time_and_number = path.name[:19], path.name[20:]  # after the time: -2, -3, …
        return time_and_number[0], int(time_and_number[1] or 1)

    found = (folder / FOLDER).glob("*")
    named = (p for p in found if OLDER.fullmatch(f"{FOLDER}/{p.name}") and p.is_dir())
    return sorted(named, key=place)


def keep_tables(folder: Path, encoded_in: Path) -> None:
    """Give the tables that a training begins with second names, under which they outlast those of the
    next data set.

    Args:
        encoded_in: where its data set was encoded. Tables of another folder than the run folder stay
            there alone.

    Raises:
        OutputError: the folder cannot be written.
    """
    own = encoded_in.resolve() == folder.resolve()
    for name in _KEPT:
        place, other = folder / name, folder / TABLES / name
        if place.name == _CHECKED and place.with_name(_PINNED).is_file():
            place = place.with_name(_PINNED)  # what was encoded, also if it was checked anew since
        if own and place.is_file():
            link_whole(place, other)
        else:
            other.unlink(missing_ok=True)


def is_moving(folder: Path) -> bool:
    """Whether a move was begun in a run folder, and did not come to its end."""
    return (folder / MOVING).is_dir()


def move(folder: Path, names: Iterable[str]) -> Path:
    """Move a training of a run folder to `older/`; returns where it is then.

    The record goes last: where a move was killed, the names follow from it once more, and the same call
    finishes it.

    Args:
        names: its files and folders, as paths from the run folder; not all need be there.

    Raises:
        OSError: something cannot be moved. What was moved is so still.
    """
    require_held(folder)
    staged = folder / MOVING
    staged.mkdir(exist_ok=True)
    for name in names:
        _rename(folder / name, staged / name)
    for name in _KEPT:
        _rename(folder / TABLES / name, staged / name)
    if (folder / _CONFIG).is_file() and not (staged / _RECORD).exists():
        # A copy: the command that is under way may name it as its recipe.
        shutil.copyfile(folder / _CONFIG, staged / _CONFIG)
    _rename(folder / _RECORD, staged / _RECORD)
    for name in (f"{TABLES}/held_out", TABLES, "state", "samples", "exports"):
        with suppress(OSError):  # not there, or files of others are in it
            (folder / name).rmdir()
    place = _free_name(folder, staged)
    place.parent.mkdir(exist_ok=True)
    return staged.rename(place)


def _rename(path: Path, other: Path) -> None:
    if path.exists():
        other.parent.mkdir(parents=True, exist_ok=True)
        if other.is_dir():
            remove(other)
        path.replace(other)


def _free_name(folder: Path, moved: Path) -> Path:
    """Where a training is moved to: named by the time of its last sign of life, as this machine's clocks
    show it."""
    signs = [moved / name for name in (_RECORD, _METRICS)]
    times = [path.stat().st_mtime for path in signs if path.is_file()] or [time.time()]
    place = folder / FOLDER / time.strftime("%Y-%m-%dT%H-%M-%S", time.localtime(max(times)))
    number = 1
    while place.exists():
        number += 1
        place = place.with_name(f"{place.name[:19]}-{number}")
    return place


def remove_older(run: Path) -> None:
    """Remove an older training. Raises `OSError`."""
    hidden = hidden_beside(run)
    shutil.rmtree(run.rename(hidden))
