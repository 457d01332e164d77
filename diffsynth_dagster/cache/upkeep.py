"""Maintenance of a store: check every tensor, measure what is used, remove what is not used."""

from dataclasses import dataclass, field
from pathlib import Path

import polars as pl
from safetensors import SafetensorError

from diffsynth_dagster.cache.held_out import FOLDER as HELD_OUT
from diffsynth_dagster.cache.layout import LAYOUT_VERSION
from diffsynth_dagster.cache.manifest import FILE_NAME, PLANNED, read_manifest
from diffsynth_dagster.cache.shards import (
    OpenShard,
    damaged,
    index_layout,
    index_row,
    read_index,
    tensor_digest,
)
from diffsynth_dagster.cache.store import LOST, Store, read_note
from diffsynth_dagster.errors import StoreError
from diffsynth_dagster.files import is_leftover, remove
from diffsynth_dagster.older import MOVING, TABLES, older_runs

PART_OF_SHARD_KEPT = 0.5
"""A clean-up rewrites a shard if less than this part of its bytes is used."""


@dataclass
class Verified:
    """The result of `verify`.

    Attributes:
        shards: number of shards.
        outdated: number of shards of another `LAYOUT_VERSION`, which nothing reads any more.
        tensors: number of tensors that the indices list.
        damaged: index file or note → what is wrong with it or with its shard.
    """

    shards: int = 0
    outdated: int = 0
    tensors: int = 0
    damaged: dict[Path, str] = field(default_factory=dict)


def verify(store: Store, drop: bool = False) -> Verified:
    """Check every index, the bytes, type and shape of every tensor, and the notes of run folders.

    Args:
        drop: remove the index of each damaged shard, so that its samples are encoded again, and
            put damaged notes aside. The next training in the run folder writes its note again.

    Raises:
        StoreError: `drop`, and the store is in use.
    """
    found = Verified()
    for file in store.index_files:
        found.shards += 1
        try:
            rows = read_index(file)
            found.outdated += index_layout(file) != LAYOUT_VERSION
        except StoreError as error:
            found.damaged[file] = error.what
            continue
        found.tensors += rows.height
        problem = _check_shard(store.path / "shards" / f"{file.stem}.safetensors", rows)
        if problem:
            found.damaged[file] = problem
    for file in store.notes:
        try:
            read_note(file)
        except StoreError as error:
            found.damaged[file] = error.what
    if drop and found.damaged:
        with store.in_use(alone=True):
            # Only the index of a shard: without it the shard is a stray file for `collect`.
            for file in found.damaged:
                if file in store.notes:
                    file.replace(file.with_suffix(LOST))
                else:
                    file.unlink(missing_ok=True)
    return found


def _check_shard(path: Path, rows: pl.DataFrame) -> str | None:
    """What is wrong with a shard, given the rows of its index; None if nothing is."""
    try:
        opened = OpenShard(path)
        for row in rows.iter_rows(named=True):
            tensor = opened.read(row["key"], row["output"])
            if index_row(row["key"], row["output"], path.stem, tensor) != row:
                return f"the index says something else of {row['key'][:16]}…/{row['output']}"
    except StoreError as error:
        return error.what
    except (OSError, SafetensorError) as error:
        return f"the shard cannot be read: {error}"
    return None


@dataclass(frozen=True)
class Use:
    """What a run folder uses of a store.

    Attributes:
        keys: number of encoded inputs.
        bytes: their size.
        own_bytes: size of those that no other run folder uses.
    """

    folder: Path
    keys: int
    bytes: int
    own_bytes: int


@dataclass(frozen=True)
class Statistics:
    """What a store holds.

    Attributes:
        keys: number of encoded inputs.
        bytes: their size, each counted once.
        used_bytes: size of those that a run folder uses.
        duplicate_bytes: size of what is stored more than once.
        stray_files: number of files that no index names.
        uses: what each run folder uses.
    """

    keys: int
    bytes: int
    used_bytes: int
    duplicate_bytes: int
    stray_files: int
    uses: list[Use]


def used_keys(store: Store) -> dict[Path, pl.LazyFrame]:
    """The keys that the users of a store need.

    Returns:
        Run folder, or folder of an older training (see `older.py`) → frame with the column `key`,
        every key once. Folders that do not exist any more are left out.

    Raises:
        StoreError: a note or a `samples.parquet` is damaged, so it is not known what it uses.
    """
    # The store's path in a manifest is not compared: a store may have been moved, and keys are
    # digests of content, so they mean the same in any store.
    used: dict[Path, pl.LazyFrame] = {}
    for folder, paths in _manifests(store).items():
        manifests = [read_manifest(p.parent, p.name, any_layout=True) for p in paths]
        # No training reads a manifest of another layout: it needs nothing.
        keys = [m.keys for m in manifests if m.layout == LAYOUT_VERSION]
        none = pl.LazyFrame(schema={"key": pl.String})
        used[folder] = pl.concat([none, *keys]).unique()
    return used


def _manifests(store: Store) -> dict[Path, list[Path]]:
    """Run folder, or folder of an older training → its manifests that exist."""
    manifests: dict[Path, list[Path]] = {}
    for folder in store.users():
        # The tables of the newest training are linked in `TABLES`: the run folder may already hold
        # those of the next. (The held-out data set is a user of its own.)
        places = {folder: [folder, folder / TABLES, folder / TABLES / HELD_OUT]}
        for run in (folder / MOVING, *older_runs(folder)):
            places[run] = [run, run / HELD_OUT]
        for run, folders in places.items():
            # There is a planned manifest while samples are encoded, or if that was interrupted.
            paths = [place / name for place in folders for name in (FILE_NAME, PLANNED)]
            existing = [path for path in paths if path.is_file()]
            if existing:
                manifests[run] = list(dict.fromkeys([*manifests.get(run, []), *existing]))
    return manifests


def statistics(store: Store) -> Statistics:
    """Measure a store.

    Raises:
        StoreError: see `used_keys`.
    """
    # Two writers may have stored the same key: it is counted once, and again as a duplicate.
    sizes = store.collect(
        store.scan().unique(["key", "output"]).group_by("key").agg(pl.col("bytes").sum())
    )
    users = used_keys(store)
    named = [
        keys.with_columns(pl.lit(number, pl.UInt32).alias("user"))
        for number, keys in enumerate(users.values())
    ]
    none = pl.LazyFrame(schema={"key": pl.String, "user": pl.UInt32})
    # A row for each key of each user. Keys that are not stored yet count as 0 bytes.
    uses = (
        pl.concat([none, *named])
        .join(sizes.lazy(), on="key", how="left")
        .with_columns(pl.col("bytes").fill_null(0), (pl.len().over("key") == 1).alias("alone"))
    )
    own = pl.when("alone").then("bytes").otherwise(0)
    table = (
        uses.group_by("user")
        .agg(pl.len(), pl.col("bytes").sum(), own.sum().alias("own"))
        .collect(engine="streaming")
    )
    by_user = {user: counts for user, *counts in table.iter_rows()}
    total = int(sizes["bytes"].sum())
    used = uses.unique("key").select(pl.col("bytes").sum()).collect().item()
    stored = store.collect(store.scan().select(pl.col("bytes").sum())).item()
    return Statistics(
        keys=sizes.height,
        bytes=total,
        used_bytes=int(used),
        duplicate_bytes=int(stored) - total,
        stray_files=len(_stray(store)),
        uses=[Use(f, *by_user.get(number, (0, 0, 0))) for number, f in enumerate(users)],
    )


def _stray(store: Store) -> list[Path]:
    """Shards without an index, and half-written files that interrupted writers left."""
    # Both are recognised by their names: other files in the folders are not the store's.
    indexed = {file.stem for file in store.index_files}
    shards = [path for path in store.shard_files if path.stem not in indexed]
    hidden = [p for place in ("shards", "index", "users") for p in (store.path / place).glob(".*")]
    return sorted([*shards, *(path for path in hidden if is_leftover(path.name))])


@dataclass(frozen=True)
class Collected:
    """The result of `collect`. `removed_files` counts shards, index files and stray files."""

    removed_keys: int
    removed_files: int
    freed_bytes: int


def collect(store: Store) -> Collected:
    """Remove what no run folder uses, and all stray files.

    A shard is rewritten with its used part if that is smaller than `PART_OF_SHARD_KEPT`; otherwise
    it stays as it is.

    Raises:
        StoreError: the store is in use; none of its run folders exists; a note or manifest is
            damaged, so it is not known what is used; or a used sample is damaged.
        OutputError: the store cannot be written.
    """
    with store.in_use(alone=True):
        before = _size(store)
        users = used_keys(store)
        # Rather refuse than remove what a run folder needs that is unknown or not mounted.
        if store.lost_notes:
            raise StoreError(
                "it is not known of every run folder what it uses of this store: notes were "
                "damaged",
                where=", ".join(str(path) for path in store.lost_notes),
                do="start the trainings of its run folders once more, which writes the notes "
                "again; remove those that are left when every run folder is among the users in "
                "`stats`",
            )
        if store.users() and not users:
            raise StoreError(
                "none of the run folders that use this store is there",
                where=str(store.path),
                do="mount or move them back; if they are gone for good, remove the store's folder",
            )
        none = pl.LazyFrame(schema={"key": pl.String})
        used = pl.concat([none, *users.values()]).unique().collect(engine="streaming")
        stray = _stray(store)
        for path in stray:
            remove(path)
        removed: list[pl.Series] = []
        files = len(stray)
        for file in store.index_files:
            rows = read_index(file)
            kept = rows.join(used, on="key", how="semi", maintain_order="left")
            # `kept.height`: a shard of empty tensors would pass as used with 0 of 0 bytes.
            if (
                int(rows["bytes"].sum()) * PART_OF_SHARD_KEPT <= int(kept["bytes"].sum())
                and kept.height
            ):
                continue
            _rewrite(store, file.stem, kept)
            removed.append(rows.join(used, on="key", how="anti")["key"].unique())
            files += 2  # the shard and its index
        keys = pl.concat(removed).n_unique() if removed else 0
        return Collected(keys, files, before - _size(store))


def _rewrite(store: Store, shard: str, kept: pl.DataFrame) -> None:
    """Write the kept rows of a shard as a new shard, then remove the old one.

    Raises:
        StoreError: the shard is damaged.
        OutputError: the new one cannot be written.
    """
    path = store.path / "shards" / f"{shard}.safetensors"
    if kept.height:
        try:
            opened = OpenShard(path)
            with store.writer() as writer:
                for key, names, digests in kept.group_by("key").agg("output", "digest").iter_rows():
                    outputs = {output: opened.read(key, output) for output in names}
                    # The writer computes new digests: without this check, damaged tensors would
                    # get valid ones.
                    if [tensor_digest(tensor) for tensor in outputs.values()] != digests:
                        raise damaged(path, f"the index says something else of {key[:16]}…")
                    writer.add(key, outputs)
        except (OSError, SafetensorError) as error:
            raise damaged(path, f"the shard cannot be read: {error}") from error
    # First the index: a shard without an index is not read, an index without a shard is damage.
    (store.path / "index" / f"{shard}.parquet").unlink()
    path.unlink(missing_ok=True)


def _size(store: Store) -> int:
    """Size of the shards and index files in bytes."""
    folders = [store.path / "shards", store.path / "index"]
    return sum(p.stat().st_size for folder in folders for p in folder.rglob("*") if p.is_file())
