"""The rows that a file was trained on, and which of them, or of their files, have changed since."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import polars as pl

from diffsynth_dagster.config.affects import off_values
from diffsynth_dagster.data.columns import described_inputs
from diffsynth_dagster.data.table.checked_table import find_checked
from diffsynth_dagster.data.table.rows import RowSource
from diffsynth_dagster.data.table.validate import CheckedTable
from diffsynth_dagster.errors import UserError, printable
from diffsynth_dagster.facts import FileState, digest_file
from diffsynth_dagster.inspect.describe import first
from diffsynth_dagster.inspect.subject import Subject
from diffsynth_dagster.inspect.tables import (
    Differences,
    Tables,
    differences,
    files_of,
    held_out_tables,
    ranges,
    tables_of,
)

# At most so many changes are listed.
_SHOWN = 20
# Files handed to the threads at once: bounds the memory for 10⁷ rows.
_AT_ONCE = 1 << 16


def trained_on(subject: Subject) -> list[str]:
    """Describe the rows that a file was trained on, and what has changed since. Returns lines.

    Raises:
        WeightsError, ParameterError: see `Subject.require_run`.
        StoreError, MetadataError: see `tables_of`.
    """
    run = subject.require_run()
    tables = tables_of(run)
    lines = [
        *_counts("the data set", tables),
        f"  trained on: rows {ranges(tables.trained_rows(run))}",
    ]
    held_out = held_out_tables(run, tables)
    # If the data set is a folder without a table, its held-out files lie below the same folder.
    left_out = () if held_out is None else (_source(held_out.checked),)
    lines += changes(tables, left_out)
    if held_out is not None:
        lines += [*_counts("held out", held_out), *changes(held_out)]
    return lines


def _counts(what: str, tables: Tables) -> list[str]:
    """The path of the table, and its number of rows by status."""
    counts = tables.checked.counts
    by_status = ", ".join(f"{count} {status}" for status, count in counts.items())
    return [
        f"{what}: {printable(_source(tables.checked))}",
        f"  as it was checked: {printable(str(tables.folder))}",
        f"  rows: {sum(counts.values())} ({by_status})",
    ]


def changes(tables: Tables, left_out: tuple[str, ...] = ()) -> list[str]:
    """Describe the changes of the rows that were used, as lines. For `left_out` see
    `changed_rows`."""
    used = tables.checked.accepted.collect(engine="streaming")
    found = [f"row {row}: {what}" for row, what in changed_files(used)]
    try:
        since = changed_rows(tables.checked, used, left_out)
    except UserError as error:
        found.append(f"the table cannot be compared: {error.what} ({error.where})")
    else:
        found += [f"row {row}: {what}" for row, _, what in since.changed]
        if since.removed:
            found.append(
                f"no longer in the table, or named otherwise: rows {ranges(since.removed)}"
            )
        if since.added:
            found.append(f"in the table, and not trained on: rows {ranges(since.added)} of now")
    if not found:
        return ["  changed since: nothing"]
    return ["  changed since:", *(f"    {printable(text)}" for text in first(found, _SHOWN))]


def changed_files(used: pl.DataFrame) -> list[tuple[int, str]]:
    """The rows with files that are missing or have another content: (number of the row, problem).

    A file whose size and time of modification are unchanged is not read again: see
    `facts.FileState`.

    Args:
        used: the accepted rows of a checked table.
    """
    found: list[tuple[int, str]] = []
    for column in files_of(used):
        parts = [f"{column}:{part}" for part in ("path", "digest", "size", "modified")]
        named = used.select("row", *parts)
        if isinstance(named.schema[parts[0]], pl.List):  # several files in a cell
            named = named.explode(*parts)
        named = named.drop_nulls(parts[0])
        # Many rows may name the same file: it is looked at once.
        files = named.drop("row").unique(parts[0], maintain_order=True)
        wrong: dict[str, str] = {}
        # Threads, because this waits for the file system, perhaps over a network.
        with ThreadPoolExecutor() as pool:
            for start in range(0, len(files), _AT_ONCE):
                rows = list(files.slice(start, _AT_ONCE).iter_rows())
                checked = zip(rows, pool.map(_problem, rows), strict=True)
                wrong |= {row[0]: why for row, why in checked if why}
        if not wrong:
            continue
        bad = named.filter(pl.col(parts[0]).is_in(list(wrong)))
        found += [
            (row, f"{column} {path}: {wrong[path]}")
            for row, path in bad.select("row", parts[0]).iter_rows()
        ]
    return sorted(found)


def _problem(known: Sequence[Any]) -> str:
    """What is wrong with a file; an empty text if it is unchanged.

    Args:
        known: path, digest, size and time of modification of the file when it was checked.
    """
    path, digest, size, modified = Path(known[0]), *known[1:]
    try:
        state = FileState.of(path)
        if state == (size, modified):
            return ""
        # A copy or a `touch` changes the time, not the content: hash the file.
        if state.size != size or digest_file(path) != digest:
            return "its content has changed"
    except OSError:
        return "it is gone, or cannot be read"
    return ""


def changed_rows(
    table: CheckedTable, used: pl.DataFrame, left_out: tuple[str, ...] = ()
) -> Differences:
    """Compare the checked table with its source as it is now.

    Args:
        left_out: files held out of a data set that is a folder without a table.

    Raises:
        UserError: the source is missing, or no longer has these columns.
    """
    # All rows are compared, so that a rejected row is not reported as new.
    whole = table.rows.collect(engine="streaming")
    since = differences(whole, _read_now(table, left_out), digests=False)
    rows = set(used["row"])
    return Differences(
        [item for item in since.changed if item[0] in rows],
        [row for row in since.removed if row in rows],
        since.added,
    )


def _source(table: CheckedTable) -> str:
    """The user's table that a checked table was made from."""
    # A checked table can be the source of another one, so this follows the chain to its start.
    path = Path(table.data.get("dataset_metadata_path", table.source))
    seen: set[Path] = set()
    while path not in seen and (checked := find_checked(path)) is not None:
        seen.add(path)
        path = Path(checked.data.get("dataset_metadata_path", checked.source))
    return table.source if path in seen else str(path)


def _read_now(table: CheckedTable, left_out: tuple[str, ...]) -> pl.DataFrame:
    """Read the source again, with the columns and parameters of the check. Raises `UserError`."""
    # A checked table does not record parameters that were off.
    values = {**off_values("rows"), **table.parameters}
    source = RowSource(
        Path(_source(table)),
        Path(table.data["dataset_base_path"]),
        str(values["metadata_encoding"]),
        values["caption_extension"],
        values["caption_prefix"],
        {},
        left_out,
    )
    return source.read(described_inputs(table.read_as), str(table.read_as[0]))
