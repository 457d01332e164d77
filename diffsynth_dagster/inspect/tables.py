"""The tables that a training was made with: which rows they have, and in what two of them differ."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl

from diffsynth_dagster.cache.held_out import FOLDER as HELD_OUT
from diffsynth_dagster.cache.held_out import last_held_out
from diffsynth_dagster.cache.manifest import CONTENT_NUMBER, Manifest, read_manifest
from diffsynth_dagster.data.table.check import BOOKKEEPING, CheckedTable
from diffsynth_dagster.data.table.checked import FILE_NAME, PINNED, read_checked
from diffsynth_dagster.errors import StoreError, printable, shown
from diffsynth_dagster.inspect.subject import Run
from diffsynth_dagster.older import TABLES

CONTENT, NAME, NUMBER = "\x00content", "\x00name", "\x00number"
_NOW = "\x00now"


@dataclass(frozen=True)
class Tables:
    """What a training was made with.

    Attributes:
        folder: where the tables lie.
        checked: every row, with what was found of its files.
        manifest: the samples that were encoded.
    """

    folder: Path
    checked: CheckedTable
    manifest: Manifest

    def trained_rows(self, run: Run) -> list[int]:
        """Numbers of the rows that were trained on, in order: those that are not held out."""
        rows = self.manifest.rows
        config = run.config
        if config is not None and config.validation_split is not None:
            rows = rows.filter(pl.col(CONTENT_NUMBER) > last_held_out(config, self.manifest.rows))
        return (
            rows.select(pl.col("row").unique().sort()).collect(engine="streaming")["row"].to_list()
        )


def tables_of(run: Run) -> Tables:
    """The tables of a training: in its run folder, or where its data set was encoded.

    Raises:
        StoreError: those that are there are of another data set, or damaged.
        MetadataError: the checked table is missing or damaged.
    """
    folders = [
        place for folder in (run.folder, run.encoded_in) for place in (folder / TABLES, folder)
    ]
    return _tables_in(folders, run.record.samples_digest, run.folder)


def held_out_tables(run: Run, tables: Tables) -> Tables | None:
    """The tables of what was held out as a data set of its own; None where nothing was. Raises: see
    `tables_of`."""
    digest = run.record.held_out_digest
    return None if digest is None else _tables_in((tables.folder / HELD_OUT,), digest, run.folder)


def _tables_in(folders: Sequence[Path], digest: str, run: Path) -> Tables:
    why: StoreError | None = None
    for folder in folders:
        try:
            manifest = read_manifest(folder, any_layout=True)
        except StoreError as error:
            why = why or error
            continue
        if manifest.digest == digest:
            pinned = (folder / PINNED).is_file()
            return Tables(folder, read_checked(folder, PINNED if pinned else FILE_NAME), manifest)
        why = None
    raise StoreError(
        "the tables that the training was made with are not there any more",
        where=str(run),
        do="nothing brings them back; the samples that it saw have the digest "
        f"{digest}, which a data set that is encoded anew can be compared with",
    ) from why


def texts_of(frame: pl.DataFrame) -> list[str]:
    """The columns that hold texts and numbers."""
    columns = frame.columns
    own = (c for c in columns if c not in BOOKKEEPING and ":" not in c)
    return [c for c in own if f"{c}:path" not in columns]


def files_of(frame: pl.DataFrame) -> list[str]:
    """The columns that name files."""
    return [c.removesuffix(":path") for c in frame.columns if c.endswith(":path")]


@dataclass(frozen=True)
class Differences:
    """In what two tables differ; rows of equal content count as the same wherever they stand.

    Attributes:
        changed: (row before, row now, what changed) of rows that name the same files.
        removed, added: numbers of the other rows, before and now.
    """

    changed: list[tuple[int, int, str]]
    removed: list[int]
    added: list[int]

    def __bool__(self) -> bool:
        return bool(self.changed or self.removed or self.added)


def differences(before: pl.DataFrame, now: pl.DataFrame, digests: bool) -> Differences:
    """Compare the rows of two tables.

    Args:
        before, now: `row`, texts, files, and with `digests` the digests of those.
        digests: whether the content of files counts; else only how they are called.
    """
    texts = [c for c in texts_of(before) if c not in files_of(before) and c in now.columns]
    files = [c for c in files_of(before) if c in now.columns]
    counted = [f"{c}:digest" for c in files] if digests else files
    one, other = (_numbered(_named(f, texts, files, counted), CONTENT) for f in (before, now))
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
    """Each row by its content, and by the files that it names (its number where it names none)."""
    name = pl.struct(files).struct.json_encode() if files else pl.col("row").cast(pl.String)
    content = pl.struct([*texts, *counted]).struct.json_encode()
    return frame.select("row", content.alias(CONTENT), name.alias(NAME))


def _numbered(frame: pl.DataFrame, key: str) -> pl.DataFrame:
    """The frame with the how-manieth of its key each row is: equal rows are told apart."""
    return frame.with_columns(pl.int_range(pl.len()).over(key).alias(NUMBER))


def _changed(
    before: pl.DataFrame,
    now: pl.DataFrame,
    pairs: pl.DataFrame,
    columns: tuple[Sequence[str], Sequence[str]],
) -> list[tuple[int, int, str]]:
    """What differs in each of some pairs of rows; see `Differences`.

    Args:
        columns: the texts, and the files whose content counts.
    """
    sides = [
        pairs.select(pl.col(name).alias("row")).join(frame, "row", "left", maintain_order="left")
        for name, frame in (("row", before), (_NOW, now))
    ]
    rows = zip(*(side.iter_rows(named=True) for side in sides), strict=True)
    return [(a["row"], b["row"], _what(a, b, *columns)) for a, b in rows]


def _what(
    before: dict[str, Any], now: dict[str, Any], texts: Sequence[str], files: Sequence[str]
) -> str:
    """What differs between two rows that name the same files."""
    found = [f"{c}: {shown(before[c])} → {shown(now[c])}" for c in texts if before[c] != now[c]]
    found += [
        f"{c} {shown(before[c])} has another content"
        for c in files
        if before[f"{c}:digest"] != now[f"{c}:digest"]
    ]
    return printable("; ".join(found))


def ranges(rows: Sequence[int], most: int = 10) -> str:
    """Numbers in order as ranges: `1-5, 7`; of many ranges the first ones."""
    found: list[tuple[int, int]] = []
    for row in rows:
        if found and row == found[-1][1] + 1:
            found[-1] = (found[-1][0], row)
        else:
            found.append((row, row))
    texts = [str(a) if a == b else f"{a}-{b}" for a, b in found[:most]]
    return ", ".join([*texts, *(["…"] if len(found) > most else [])])
