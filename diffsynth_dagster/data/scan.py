"""Read files with Polars, each path taken literally.

Polars treats `[1]`, `*` and `?` in a path as a pattern, and a leading `~` as the home folder: given
`m[1].parquet` it would read `m1.parquet`. So all reading with Polars goes through this module,
which turns that off. `tests/test_paths.py` finds code that does not.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import polars as pl


def scan_parquet(
    path: Path | Sequence[Path], schema: Mapping[str, Any] | None = None
) -> pl.LazyFrame:
    """The rows of one or several Parquet files, as a lazy frame.

    Args:
        schema: the columns and their types. With it, no file is opened before its rows are read.
    """
    paths = [path] if isinstance(path, Path) else path
    # `glob=False` turns patterns off; an absolute path cannot begin with `~`.
    return pl.scan_parquet([p.absolute() for p in paths], schema=schema, glob=False)


def read_parquet(path: Path) -> pl.DataFrame:
    """The rows of a Parquet file."""
    return pl.read_parquet(path.absolute(), glob=False)


def read_notes(path: Path) -> dict[str, str]:
    """The key-value metadata of a Parquet file."""
    return pl.read_parquet_metadata(path.absolute())


def scan_csv(path: Path, **options: Any) -> pl.LazyFrame:
    """The rows of a csv file, as a lazy frame.

    Args:
        options: passed to `polars.scan_csv`.
    """
    return pl.scan_csv(path.absolute(), **options, glob=False)


def read_csv(path: Path, columns: Sequence[str]) -> pl.DataFrame:
    """The named columns of a csv file."""
    return pl.read_csv(path.absolute(), columns=columns, glob=False)
