"""Read JSON rows as a frame of text: a list of objects, or one object after the other (JSON lines).

`ijson` reads the rows one by one, so the file need not fit into memory. The first character of the
file, not its name, decides which of the two forms it has.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from decimal import Decimal
from itertools import islice
from pathlib import Path
from typing import Any

import ijson
import polars as pl

from diffsynth_dagster.data.columns import Input

_BATCH = 1 << 15
"""Number of rows that are held as Python objects at a time."""
_to_json = json.JSONEncoder(default=str, ensure_ascii=False).encode


class _Row(dict[str, Any]):
    """A JSON object that also keeps the names of repeated keys, in `twice`."""

    twice: tuple[str, ...] = ()

    def __setitem__(self, key: str, value: Any) -> None:
        if key in self:
            self.twice = (*self.twice, key)
        dict.__setitem__(self, key, value)  # twice as fast as `super()`


def read_json(
    text: Path, inputs: Sequence[Input]
) -> tuple[pl.DataFrame, tuple[str, ...], Mapping[int, tuple[str, str]]]:
    """Read the columns of a JSON file in UTF-8.

    Returns:
        The columns of `inputs` as text: see `_text`; the names of all columns; and row index →
        reason and message of the rows that cannot be used.

    Raises:
        ValueError: the text is not JSON, or a row is not an object; the message names the row.
    """
    types = {item.column: pl.String() for item in inputs}
    parts = [pl.DataFrame(schema=types)]
    columns: dict[str, None] = {}
    problems: dict[int, tuple[str, str]] = {}
    rows = _rows(text)
    while batch := list(islice(rows, _BATCH)):
        start = sum(part.height for part in parts)
        for index, row in enumerate(batch, start):
            if not columns.keys() >= row.keys():
                columns |= dict.fromkeys(row)
            problem = _problem(row, inputs)
            if problem is not None:
                problems[index] = problem
        values = {i.column: [_text(row.get(i.column), i) for row in batch] for i in inputs}
        parts.append(pl.DataFrame(values, schema=types))
    return pl.concat(parts), tuple(columns), problems


def _rows(text: Path) -> Iterator[_Row]:
    """The objects of a file, one by one. Raises `ValueError`."""
    number = 1  # for messages
    with text.open("rb") as source:
        parts = iter(lambda: source.read(4096), b"")
        start = next((part for part in parts if not part.isspace()), b"").lstrip()
        if not start:
            return
        is_list = start.startswith(b"[")
        source.seek(0)
        options = {"prefix": "item"} if is_list else {"prefix": "", "multiple_values": True}
        try:
            for row in ijson.items(source, **options, map_type=_Row):
                if not isinstance(row, _Row):
                    raise ValueError(f"row {number} is not an object of column names and values")
                yield row
                number += 1
        except (ijson.JSONError, UnicodeDecodeError) as error:
            raise ValueError(f"row {number} is not JSON: {_why(error)}") from error


def _why(error: ijson.JSONError | UnicodeDecodeError) -> str:
    """What is wrong, and the text near it, from an error of ijson."""
    if isinstance(error, UnicodeDecodeError):
        return str(error)
    message = error.args[0]
    if isinstance(message, bytes):  # if the text is not UTF-8
        message = message.decode("utf-8", "replace")
    # The second line is the text near the error; the third marks the place in it.
    what, *shown = str(message).split("\n")
    near = shown[0].strip() if shown else ""
    return f"{what}, near {near}" if near else what


def _problem(row: _Row, inputs: Sequence[Input]) -> tuple[str, str] | None:
    """Reason and message if a row cannot be used, else None."""
    for item in inputs:
        if item.column in row.twice:
            return "repeated_key", f"{item.column}: the row has this key twice"
        if isinstance(row.get(item.column), (dict, bool) if item.many else (dict, bool, list)):
            return "wrong_type", f"{item.column}: the value is of another type than the column's"
    return None


def _text(value: Any, item: Input) -> str | None:
    """A JSON value as text, as it would be in csv. A list is its JSON text; a number in a text
    column keeps its digits."""
    if isinstance(value, str) and item.many and value.lstrip().startswith("["):
        return _to_json([value])  # one text that looks like a list
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, Decimal) and item.kind == "number":
        return f"{value.normalize():f}"  # 4.0 becomes 4, because samples' keys depend on the text
    if isinstance(value, list | dict | bool):
        return _to_json(value)
    return str(value)
