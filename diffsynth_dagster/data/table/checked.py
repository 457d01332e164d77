"""The checked table of a run folder: `metadata.parquet`, made once and read by all that follows.

Its header says where it came from and with which parameters it was checked. By this it is
recognised: a `dataset_metadata_path` that names such a file is taken as it is, and nothing of it is
made or checked again.
"""

import json
from pathlib import Path

import polars as pl

from diffsynth_dagster.data.table.check import CheckedTable
from diffsynth_dagster.errors import MetadataError
from diffsynth_dagster.files import write_whole

FILE_NAME = "metadata.parquet"
_NOTES = "diffsynth_dagster"


def write_checked(table: CheckedTable, folder: Path) -> CheckedTable:
    """Write `metadata.parquet` (every row) and `rejected.csv` into a run folder.

    Returns:
        The table as it lies there.

    Raises:
        OutputError: the folder cannot be written.
    """
    notes = {_NOTES: json.dumps({"source": table.source, "parameters": table.parameters})}
    path = write_whole(
        folder / FILE_NAME, lambda staged: table.rows.sink_parquet(staged, metadata=notes)
    )
    rejected = table.rejected.select("row", "status", "message").collect()
    write_whole(folder / "rejected.csv", rejected.write_csv)
    return CheckedTable(pl.scan_parquet(path), table.source, table.parameters)


def find_checked(path: Path) -> CheckedTable | None:
    """The checked table that a file is; None for any other metadata table, or no file."""
    if path.suffix.lower() != ".parquet" or not path.is_file():
        return None
    try:
        notes = pl.read_parquet_metadata(path).get(_NOTES)
        return None if notes is None else CheckedTable(pl.scan_parquet(path), **json.loads(notes))
    except (OSError, pl.exceptions.PolarsError, ValueError, TypeError):
        return None  # whoever reads it as a table says what is wrong with it


def read_checked(folder: Path) -> CheckedTable:
    """The checked table of a run folder.

    Raises:
        MetadataError: there is none, or it is damaged.
    """
    found = find_checked(folder / FILE_NAME)
    if found is None:
        raise MetadataError(
            "the folder holds no checked table",
            where=str(folder / FILE_NAME),
            do="materialize the metadata of this recipe first",
        )
    return found
