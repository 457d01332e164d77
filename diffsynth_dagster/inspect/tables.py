"""The tables that a training used, and a comparison of the rows of two tables."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl

from diffsynth_dagster.cache.held_out import FOLDER as HELD_OUT
from diffsynth_dagster.cache.held_out import divided
from diffsynth_dagster.cache.manifest import Manifest, read_manifest
from diffsynth_dagster.data.table.checked_table import FILE_NAME, PINNED, read_checked
from diffsynth_dagster.data.table.validate import BOOKKEEPING, CheckedTable
from diffsynth_dagster.errors import StoreError, printable, shown
from diffsynth_dagster.inspect.subject import Run
from diffsynth_dagster.older import TABLES

# Names of helper columns. They begin with a NUL character, so no column of a user has such a name.
CONTENT, NAME, NUMBER = "\x00content", "\x00name", "\x00number"
_NOW = "\x00now"


@dataclass(frozen=True)
class Tables:
    """The tables that a training used.

    Attributes:
        folder: the folder of the tables.
        checked: the checked table: every row, with the facts of its files.
        manifest: the encoded samples.
    """

    folder: Path
    checked: CheckedTable
    manifest: Manifest

    def trained_rows(self, run: Run) -> list[int]:
        """The sorted numbers of the rows that were trained on: all that are not held out, nor near
        copies of those."""
        rows = self.manifest.rows
        config = run.config
        if config is not None and config.validation_split is not None:
            rows = divided(config, rows, None).trained
        return (
            rows.select(pl.col("row").unique().sort()).collect(engine="streaming")["row"].to_list()
        )


def tables_of(run: Run) -> Tables:
    """Find the tables of a training in its run folder, or where its data set was encoded.

    Raises:
        StoreError: the tables found there are of another data set, or damaged.
        MetadataError: the checked table is missing or damaged.
    """
    # `.tables/` first: the tables in the folder itself may be those of the next training already.
    folders = [
        place for folder in (run.folder, run.encoded_in) for place in (folder / TABLES, folder)
    ]
    return _tables_in(folders, run.record.samples_digest, run.folder)


def held_out_tables(run: Run, tables: Tables) -> Tables | None:
    """The tables of the held-out data set; None if the training had no such data set of its own.
    Raises: see `tables_of`."""
    digest = run.record.held_out_digest
    return None if digest is None else _tables_in((tables.folder / HELD_OUT,), digest, run.folder)


def _tables_in(folders: Sequence[Path], digest: str, run: Path) -> Tables:
    """The tables of the first folder whose manifest has a digest. Raises `StoreError`,
    `MetadataError`."""
    why: StoreError | None = None
    for folder in folders:
        try:
            manifest = read_manifest(folder, any_layout=True)
        except StoreError as error:
            why = why or error
            continue
        if manifest.digest == digest:
            # The pinned table is the one that was encoded; the other may have been checked anew.
            pinned = (folder / PINNED).is_file()
            return Tables(folder, read_checked(folder, PINNED if pinned else FILE_NAME), manifest)
        why = None  # these tables can be read, but are of another training
    raise StoreError(
        "the tables that the training was made with are not there any more",
        where=str(run),
        do="nothing brings them back; the samples that it saw have the digest "
        f"{digest}, which a data set that is encoded anew can be compared with",
    ) from why


def texts_of(frame: pl.DataFrame) -> list[str]:
    """The columns of a checked table that hold texts and numbers."""
    columns = frame.columns
    # The facts of a file column `image` are in columns such as `image:path`.
    inputs = (c for c in columns if c not in BOOKKEEPING and ":" not in c)
    return [c for c in inputs if f"{c}:path" not in columns]


def files_of(frame: pl.DataFrame) -> list[str]:
    """The columns of a checked table that name files."""
    return [c.removesuffix(":path") for c in frame.columns if c.endswith(":path")]


@dataclass(frozen=True)
class Differences:
    """The differences of two tables. The order of rows does not count.

    Attributes:
        changed: (row before, row now, what changed) for rows that name the same files.
        removed, added: the numbers of all other rows that are only in the table before, or only in
            the table now.
    """

    changed: list[tuple[int, int, str]]
    removed: list[int]
    added: list[int]

    def __bool__(self) -> bool:
        return bool(self.changed or self.removed or self.added)


def differences(before: pl.DataFrame, now: pl.DataFrame, digests: bool) -> Differences:
    """Compare the rows of two tables.

    Args:
        before, now: tables with the columns `row`, texts and files; with `digests`, also the
            digests of the files.
        digests: whether files are compared by their content, else by their names.
    """
    texts = [c for c in texts_of(before) if c not in files_of(before) and c in now.columns]
    files = [c for c in files_of(before) if c in now.columns]
    counted = [f"{c}:digest" for c in files] if digests else files
    one, other = (_numbered(_named(f, texts, files, counted), CONTENT) for f in (before, now))
    # First drop the rows of equal content from both tables; then pair what is left by its files.
    keys = [CONTENT, NUMBER]
    left = [a.join(b, on=keys, how="anti") for a, b in ((one, other), (other, one))]
    left = [_numbered(frame.drop(NUMBER), NAME) for frame in left]
    keys = [NAME, NUMBER]
    pairs = left[0].join(left[1].rename({"row": _NOW}).select(*keys, _NOW), on=keys)
    changed = _changed(before, now, pairs.sort("row"), (texts, files if digests else []))
    removed, added = (
        a.join(b, on=keys, how="anti")["row"].sort().to_list()
        for a, b in ((left[0], left[1]), (left[1], left[0]))
    )
    return Differences(changed, removed, added)


def _named(
    frame: pl.DataFrame, texts: Sequence[str], files: Sequence[str], counted: Sequence[str]
) -> pl.DataFrame:
    """Two keys for each row: its content, and the files it names (without files, its number)."""
    name = pl.struct(files).struct.json_encode() if files else pl.col("row").cast(pl.String)
    content = pl.struct([*texts, *counted]).struct.json_encode()
    return frame.select("row", content.alias(CONTENT), name.alias(NAME))


def _numbered(frame: pl.DataFrame, key: str) -> pl.DataFrame:
    """Number the rows that have equal keys, so that a join pairs each of them once."""
    return frame.with_columns(pl.int_range(pl.len()).over(key).alias(NUMBER))


def _changed(
    before: pl.DataFrame,
    now: pl.DataFrame,
    pairs: pl.DataFrame,
    columns: tuple[Sequence[str], Sequence[str]],
) -> list[tuple[int, int, str]]:
    """Describe how the rows of each pair differ; see `Differences.changed`.

    Args:
        pairs: the numbers of the rows, `row` before and `_NOW` now.
        columns: the text columns, and the file columns that are compared by content.
    """
    sides = [
        pairs.select(pl.col(name).alias("row")).join(frame, "row", "left", maintain_order="left")
        for name, frame in (("row", before), (_NOW, now))
    ]
    # Both sides are in the order of the pairs.
    rows = zip(*(side.iter_rows(named=True) for side in sides), strict=True)
    return [(a["row"], b["row"], _what(a, b, *columns)) for a, b in rows]


def _what(
    before: dict[str, Any], now: dict[str, Any], texts: Sequence[str], files: Sequence[str]
) -> str:
    """Describe how two rows that name the same files differ."""
    found = [f"{c}: {shown(before[c])} → {shown(now[c])}" for c in texts if before[c] != now[c]]
    found += [
        f"{c} {shown(before[c])} has another content"
        for c in files
        if before[f"{c}:digest"] != now[f"{c}:digest"]
    ]
    return printable("; ".join(found))


def ranges(rows: Sequence[int], most: int = 10) -> str:
    """Sorted numbers as ranges, such as `1-5, 7`. At most `most` ranges, then an ellipsis."""
    found: list[tuple[int, int]] = []
    for row in rows:
        if found and row == found[-1][1] + 1:
            found[-1] = (found[-1][0], row)
        else:
            found.append((row, row))
    texts = [str(a) if a == b else f"{a}-{b}" for a, b in found[:most]]
    return ", ".join([*texts, *(["…"] if len(found) > most else [])])
