"""BLAKE3 digests of columns and tables, computed by Polars without a Python object for each row."""

from typing import Any

import polars as pl
import polars_hash  # noqa: F401  # pyright: ignore[reportUnusedImport] - adds `Expr.chash`
from blake3 import blake3


def digest_column(text: pl.Expr) -> pl.Expr:
    """BLAKE3 of each text in a column, in hexadecimal, as `facts.digest_text` computes it."""
    expression: Any = text  # the plugin adds `chash` at run time; Polars' types do not know it
    return expression.chash.blake3()


def digest_rows(rows: pl.LazyFrame) -> str:
    """BLAKE3 of a table: its rows are hashed in order, each as one line of JSON.

    The rows are read in batches, so a table of any length needs little memory.
    """
    line = pl.struct(pl.all()).struct.json_encode() + "\n"
    # The names of the columns first: a table without rows has no lines that would contain them.
    hasher = blake3(rows.collect_schema().names().__repr__().encode())
    for batch in rows.select(line.alias("line")).collect_batches(maintain_order=True):
        # One string for the whole batch: hashing line by line would loop in Python.
        hasher.update(batch["line"].str.join("").item().encode())
    return hasher.hexdigest()
