"""Frames of Polars, read from the very file that is named.

Polars by itself reads `[1]`, `*` and `?` in a path as a pattern, and `~` at its beginning as the home
folder: of the file `m[1].parquet` it would read `m1.parquet`. Whatever reads a file with Polars does it
here; `tests/test_paths.py` finds what does not.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import polars as pl


def scan_parquet(
    path: Path | Sequence[Path], schema: Mapping[str, Any] | None = None
) -> pl.LazyFrame:
    """The rows of a Parquet file, or of several, lazily.

    Args:
        schema: the columns and their types: with it, no file is looked into before it is read.
    """
    paths = [path] if isinstance(path, Path) else path
    return pl.scan_parquet([p.absolute() for p in paths], schema=schema, glob=False)


def read_parquet(path: Path) -> pl.DataFrame:
    """The rows of a Parquet file."""
    return pl.read_parquet(path.absolute(), glob=False)


def read_notes(path: Path) -> dict[str, str]:
    """The texts that a Parquet file says beside its rows: its metadata."""
    return pl.read_parquet_metadata(path.absolute())


def scan_csv(path: Path, **options: Any) -> pl.LazyFrame:
    """The rows of a csv file, lazily.

    Args:
        options: those of `polars.scan_csv`.
    """
    return pl.scan_csv(path.absolute(), **options, glob=False)


def read_csv(path: Path, columns: Sequence[str]) -> pl.DataFrame:
    """Columns of a csv file."""
    return pl.read_csv(path.absolute(), columns=columns, glob=False)


def scan_lines(path: Path, schema: Mapping[str, Any], row_index_name: str) -> pl.LazyFrame:
    """The rows of a jsonl file, lazily.

    Args:
        schema: the columns and their types.
        row_index_name: a column with the number of each row, from 0.
    """
    # Opened: this one takes every path for a pattern. Polars keeps a descriptor of its own.
    with path.open("rb") as file:
        return pl.scan_ndjson(file, schema=schema, row_index_name=row_index_name)
