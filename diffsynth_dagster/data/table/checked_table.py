"""The checked table of a run folder, `metadata.parquet`: the rows with their status and file facts.

The file's metadata say where the table comes from and with which parameters it was checked. If
`dataset_metadata_path` names such a file, it is recognised by them and not checked again.
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
"""The table that is being encoded. It does not change if `metadata.parquet` is written again."""
_NOTES = "diffsynth_dagster"
"""The entry of the file's metadata, and the fields of `CheckedTable` in it, as JSON."""
_NOTED = ("source", "parameters", "data", "read_as", "published_frame_rate")


def write_checked(table: CheckedTable, folder: Path, pinned: bool = False) -> CheckedTable:
    """Write `metadata.parquet` (every row) and `rejected.csv` into a run folder.

    Args:
        pinned: whether to write it as `PINNED` too: the run that owns the folder will encode it.

    Returns:
        The table with rows that are read from the written file.

    Raises:
        OutputError: the folder cannot be written.
    """
    values = {name: getattr(table, name) for name in _NOTED}
    notes = {_NOTES: json.dumps(values)}
    path = write_sealed(
        folder / (PINNED if pinned else FILE_NAME),
        lambda staged, metadata: table.rows.sink_parquet(staged, metadata=metadata),
        notes,
    )
    if pinned:  # one file with two names
        link_whole(path, folder / FILE_NAME)
    rejected = table.rejected.select("row", "status", "message").collect()
    write_whole(folder / "rejected.csv", rejected.write_csv)
    return replace(table, rows=scan_parquet(path))


def find_checked(path: Path) -> CheckedTable | None:
    """Open a checked table; None if the file is another metadata table, or does not exist.

    Raises:
        MetadataError: it is a checked table, but damaged or from an older version.
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
        # Older versions did not find out which frames of a clip are shown.
        if any(c.endswith(":stride") and f"{c[:-6]}shown" not in columns for c in columns):
            raise MetadataError(
                "the table was checked by an older version, which did not find out all that is "
                "needed to read its files as they are shown",
                where=str(path),
                do="check the data set again: materialize the metadata, or name the original table",
            )
        return table
    except (OSError, pl.exceptions.PolarsError, ValueError, TypeError):
        return None  # the caller reads it as a plain table, and reports what is wrong with it


def read_checked(folder: Path, name: str = FILE_NAME) -> CheckedTable:
    """Open the checked table of a run folder.

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
    """Link the checked table of a run folder to the name `PINNED`, so that it is kept as it is now.

    Raises:
        OutputError: the folder cannot be written.
    """
    link_whole(folder / FILE_NAME, folder / PINNED)
