"""The checked table of a run folder: `metadata.parquet`, made once and read by all that follows.

Its header says where it came from and with which parameters it was checked. By this it is
recognised: a `dataset_metadata_path` that names such a file is taken as it is, and nothing of it is
made or checked again.
"""

import json
from dataclasses import replace
from pathlib import Path

import polars as pl

from diffsynth_dagster.data.scan import read_notes, scan_parquet
from diffsynth_dagster.data.table.validate import CheckedTable
from diffsynth_dagster.errors import MetadataError
from diffsynth_dagster.files import link_whole, write_whole
from diffsynth_dagster.seal import seal_is_broken, write_sealed

FILE_NAME = "metadata.parquet"
PINNED = ".metadata.encoded.parquet"
"""The table that is being encoded: it stays what it is when the other is made anew meanwhile."""
_NOTES = "diffsynth_dagster"
_NOTED = ("source", "parameters", "data", "read_as", "published_frame_rate")


def write_checked(table: CheckedTable, folder: Path, pinned: bool = False) -> CheckedTable:
    """Write `metadata.parquet` (every row) and `rejected.csv` into a run folder.

    Args:
        pinned: whether it is what the owner of the folder goes on with: see `PINNED`.

    Returns:
        The table as it lies there.

    Raises:
        OutputError: the folder cannot be written.
    """
    values = {name: getattr(table, name) for name in _NOTED}
    notes = {_NOTES: json.dumps(values)}
    path = write_sealed(
        folder / (PINNED if pinned else FILE_NAME),
        lambda staged, said: table.rows.sink_parquet(staged, metadata=said),
        notes,
    )
    if pinned:
        link_whole(path, folder / FILE_NAME)
    rejected = table.rejected.select("row", "status", "message").collect()
    write_whole(folder / "rejected.csv", rejected.write_csv)
    return replace(table, rows=scan_parquet(path))


def find_checked(path: Path) -> CheckedTable | None:
    """The checked table that a file is; None for any other metadata table, or no file.

    Raises:
        MetadataError: it was one, and is damaged, or was made by an older version.
    """
    if path.suffix.lower() != ".parquet" or not path.is_file():
        return None
    try:
        if seal_is_broken(path):
            raise MetadataError(
                "the checked table is damaged: its bytes have changed",
                where=str(path),
                do="check the data set again: materialize the metadata, or name the original table",
            )
        notes = read_notes(path).get(_NOTES)
        if notes is None:
            return None
        table = CheckedTable(scan_parquet(path), **json.loads(notes))
        columns = set(table.rows.collect_schema())
        if any(c.endswith(":stride") and f"{c[:-6]}shown" not in columns for c in columns):
            raise MetadataError(
                "the table was checked by an older version, which did not find out all that is needed to "
                "read its files as they are shown",
                where=str(path),
                do="check the data set again: materialize the metadata, or name the original table",
            )
        return table
    except (OSError, pl.exceptions.PolarsError, ValueError, TypeError):
        return None  # whoever reads it as a table says what is wrong with it


def read_checked(folder: Path, name: str = FILE_NAME) -> CheckedTable:
    """The checked table of a run folder.

    Raises:
        MetadataError: there is none, or it is damaged.
    """
    found = find_checked(folder / name)
    if found is None:
        path = folder / name
        raise MetadataError(
            "the checked table cannot be read"
            if path.is_file()
            else "the folder holds no checked table",
            where=str(path),
            do="materialize the metadata of this recipe first",
        )
    return found


def pin(folder: Path) -> None:
    """Keep the checked table of a run folder as it is now under the name `PINNED`.

    Raises:
        OutputError: the folder cannot be written.
    """
    link_whole(folder / FILE_NAME, folder / PINNED)
