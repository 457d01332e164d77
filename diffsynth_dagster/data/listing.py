"""Which files a data set has, without reading them: whether any has changed since."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

from diffsynth_dagster.config import TrainingConfig
from diffsynth_dagster.facts import FACTS

_MARKS = ("run.json", "launch.yaml", ".owner.json", FACTS)
"""What only a run folder or a store holds."""


@dataclass(frozen=True)
class Listing:
    """What lies in a data set.

    Attributes:
        digest: of the names, sizes and modification times of all files.
        files: how many there are.
        bytes: how large they are together.
    """

    digest: str
    files: int
    bytes: int


def list_data(config: TrainingConfig) -> Listing:
    """The tables of a data set and every file in its folder, as they lie there now.

    Hidden files are left out, and so are run folders, stores, Dagster's folder, folders that may not be read,
    and files that rows name outside of `dataset_base_path`. Nothing is read; what is missing is no error.

    Raises:
        OSError: the folder of the data set cannot be listed.
    """
    digest, files, size = blake2b(digest_size=16), 0, 0
    for name, stat in _entries(config):
        # Sizes and times have no zero byte in them, and neither has a name.
        digest.update(b"%b\0%d %d\0" % (os.fsencode(name), stat.st_size, stat.st_mtime_ns))
        files, size = files + 1, size + stat.st_size
    return Listing(digest.hexdigest(), files, size)


def _entries(config: TrainingConfig) -> Iterator[tuple[str, os.stat_result]]:
    """Every file once, in an order that depends on their names alone."""
    tables = set[tuple[int, int]]()
    for parameter in ("dataset_metadata_path", "validation_metadata_path"):
        table: str | None = getattr(config, parameter)
        if table is not None and os.path.isfile(table):
            stat = os.stat(table)
            tables.add((stat.st_dev, stat.st_ino))
            yield f"{parameter} {table}", stat
    written = (config.output_path, config.cache_path, os.environ.get("DAGSTER_HOME"))
    own = {os.path.realpath(path) for path in written if path}
    for folder in _folders(config):
        for name, stat in walk(folder, own - {os.path.realpath(folder)}):
            if (stat.st_dev, stat.st_ino) not in tables:
                yield name, stat


def _folders(config: TrainingConfig) -> list[str]:
    """The folder of a data set, and those that are tables and lie elsewhere."""
    named = (
        config.dataset_base_path,
        config.dataset_metadata_path,
        config.validation_metadata_path,
    )
    found: list[str] = []
    for folder in named:
        if folder and os.path.isdir(folder):
            place = os.path.realpath(folder)
            if not any(Path(place).is_relative_to(os.path.realpath(above)) for above in found):
                found.append(folder)
    return found


def walk(base: str, left_out: set[str]) -> Iterator[tuple[str, os.stat_result]]:
    """The files in a folder and all below, by their paths from it: links are followed, each folder is
    looked into once, and what is hidden or of this project's own is left out.

    Args:
        left_out: further folders, links followed.

    Raises:
        OSError: the folder itself cannot be listed.
    """
    waiting, seen = [base], set[tuple[int, int]]()
    while waiting:
        folder = waiting.pop()
        try:
            place = os.stat(folder)
            with os.scandir(folder) as entries:
                listed = sorted(entries, key=lambda entry: entry.name)
        except (FileNotFoundError, PermissionError):
            if folder == base:
                raise
            continue
        if (place.st_dev, place.st_ino) in seen:
            continue
        seen.add((place.st_dev, place.st_ino))
        if folder != base and any(entry.name in _MARKS for entry in listed):
            continue
        for entry in listed:
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                if os.path.realpath(entry.path) not in left_out:
                    waiting.append(entry.path)
                continue
            try:
                stat = entry.stat()
            except FileNotFoundError:  # it was removed meanwhile, or is a link to nothing
                continue
            yield os.path.relpath(entry.path, base), stat
