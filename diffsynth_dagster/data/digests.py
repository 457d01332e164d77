"""Digests of columns: BLAKE3 of every value at once, without a Python object for each row."""

from typing import Any

import polars as pl
import polars_hash  # noqa: F401  # pyright: ignore[reportUnusedImport] - adds `Expr.chash`
from blake3 import blake3


def digest_column(text: pl.Expr) -> pl.Expr:
    """BLAKE3 of each text of a column, in hexadecimal; equal to `facts.digest_text`."""
    expression: Any = text
    return expression.chash.blake3()


def digest_rows(rows: pl.LazyFrame) -> str:
    """BLAKE3 of a table: of its rows as JSON, one in each line, in order.

    The rows are read in batches, so that a table of any length needs little memory.
    """
    line = pl.struct(pl.all()).struct.json_encode() + "\n"
    hasher = blake3(rows.collect_schema().names().__repr__().encode())
    for batch in rows.select(line.alias("line")).collect_batches(maintain_order=True):
        hasher.update(batch["line"].str.join("").item().encode())
    return hasher.hexdigest()
