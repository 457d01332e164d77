"""List the files of a data set without reading them, to see whether any was added or changed."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

from diffsynth_dagster.config import TrainingConfig
from diffsynth_dagster.facts import FACTS

_MARKS = ("run.json", "launch.yaml", ".owner.json", FACTS)
"""A folder that holds one of these files is a run folder or a store, not data."""


@dataclass(frozen=True)
class Listing:
    """The files of a data set, summed up.

    Attributes:
        digest: digest of the names, sizes and modification times of all files.
        files: number of files.
        bytes: total size of the files.
    """

    digest: str
    files: int
    bytes: int


def list_data(config: TrainingConfig) -> Listing:
    """List the tables of a data set and every file in its folder. No file is opened.

    Skipped are hidden files, run folders, stores, Dagster's folder, folders without read
    permission, and files outside of `dataset_base_path`. A table or folder that does not exist is
    not an error.

    Raises:
        OSError: the folder of the data set cannot be listed.
    """
    digest, files, size = blake2b(digest_size=16), 0, 0
    for name, stat in _entries(config):
        # Zero bytes separate the entries unambiguously: names, sizes and times contain none.
        digest.update(b"%b\0%d %d\0" % (os.fsencode(name), stat.st_size, stat.st_mtime_ns))
        files, size = files + 1, size + stat.st_size
    return Listing(digest.hexdigest(), files, size)


def _entries(config: TrainingConfig) -> Iterator[tuple[str, os.stat_result]]:
    """Yield every file once, with a unique name, in an order that depends on the names alone."""
    tables = set[tuple[int, int]]()
    for parameter in ("dataset_metadata_path", "validation_metadata_path"):
        table: str | None = getattr(config, parameter)
        if table is not None and os.path.isfile(table):
            stat = os.stat(table)
            tables.add((stat.st_dev, stat.st_ino))
            yield f"{parameter} {table}", stat
    # The training writes into these itself. They do not count as changes of the data.
    written = (config.output_path, config.cache_path, os.environ.get("DAGSTER_HOME"))
    own = {os.path.realpath(path) for path in written if path}
    for folder in _folders(config):
        for name, stat in walk(folder, own - {os.path.realpath(folder)}):
            # A table inside the folder was yielded above; the inode finds it under any path.
            if (stat.st_dev, stat.st_ino) not in tables:
                yield name, stat


def _folders(config: TrainingConfig) -> list[str]:
    """The folder of a data set, and folders outside of it that are named as tables."""
    named = (
        config.dataset_base_path,
        config.dataset_metadata_path,
        config.validation_metadata_path,
    )
    found: list[str] = []
    for folder in named:
        if folder and os.path.isdir(folder):
            real = os.path.realpath(folder)
            if not any(Path(real).is_relative_to(os.path.realpath(above)) for above in found):
                found.append(folder)
    return found


def walk(base: str, left_out: set[str]) -> Iterator[tuple[str, os.stat_result]]:
    """Yield the files in a folder and its subfolders, with their paths relative to it.

    Links are followed, and each folder is visited once. Hidden files and folders, run folders and
    stores are skipped.

    Args:
        left_out: further folders to skip, as real paths.

    Raises:
        OSError: the folder itself cannot be listed.
    """
    waiting, seen = [base], set[tuple[int, int]]()
    while waiting:
        folder = waiting.pop()
        try:
            status = os.stat(folder)
            with os.scandir(folder) as entries:
                listed = sorted(entries, key=lambda entry: entry.name)
        except (FileNotFoundError, PermissionError):
            if folder == base:
                raise
            continue
        # A link may lead back to a folder above: without this the walk would never end.
        if (status.st_dev, status.st_ino) in seen:
            continue
        seen.add((status.st_dev, status.st_ino))
        # The base itself is data even if someone keeps a file named like a mark in it.
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
            except FileNotFoundError:  # removed since it was listed, or a broken link
                continue
            yield os.path.relpath(entry.path, base), stat
