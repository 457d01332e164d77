"""Looking after a store: check every tensor, list what uses what, drop what nothing uses."""

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
"""A shard is written anew when less of it than this is still used."""


@dataclass
class Verified:
    """What `verify` found.

    Attributes:
        outdated: shards of another layout: their samples may not be those that were checked. Nothing
            reads them any more.
        damaged: file of the store → what is wrong with it or its shard.
    """

    shards: int = 0
    outdated: int = 0
    tensors: int = 0
    damaged: dict[Path, str] = field(default_factory=dict)


def verify(store: Store, drop: bool = False) -> Verified:
    """Read all that trainings read of a store: every index, every tensor that it names, by its bytes,
    type and shape, and the notes of the run folders.

    Args:
        drop: remove what is damaged: the indices of such shards, so that their samples are encoded
            again. Such notes are put aside, until the next training in the run folder writes them
            again.

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
            for file in found.damaged:
                if file in store.notes:
                    file.replace(file.with_suffix(LOST))
                else:
                    file.unlink(missing_ok=True)
    return found


def _check_shard(path: Path, rows: pl.DataFrame) -> str | None:
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
    """What one run folder uses: encoded inputs, and bytes of them that no other uses."""

    folder: Path
    keys: int
    bytes: int
    own_bytes: int


@dataclass(frozen=True)
class Statistics:
    """What a store holds, in bytes of tensors and files."""

    keys: int
    bytes: int
    used_bytes: int
    duplicate_bytes: int
    stray_files: int
    uses: list[Use]


def used_keys(store: Store) -> dict[Path, pl.LazyFrame]:
    """Run folder → the keys that its samples need, a column `key`; a folder that is gone uses
    nothing. Older trainings (see `older.py`) are run folders too.

    A store that was moved keeps its users: keys are content, so what they name is the same.

    Raises:
        StoreError: a `samples.parquet` is damaged, so that it is not known what it uses.
    """
    used: dict[Path, pl.LazyFrame] = {}
    for folder, paths in _manifests(store).items():
        manifests = [read_manifest(p.parent, p.name, any_layout=True) for p in paths]
        # No training reads a manifest of another layout.
        keys = [m.keys for m in manifests if m.layout == LAYOUT_VERSION]
        none = pl.LazyFrame(schema={"key": pl.String})
        used[folder] = pl.concat([none, *keys]).unique()
    return used


def _manifests(store: Store) -> dict[Path, list[Path]]:
    """Run folder → its manifests that are there; and so the folders of its older trainings, which may be
    gone on with."""
    found: dict[Path, list[Path]] = {}
    for folder in store.users():
        own = [folder, folder / TABLES, folder / TABLES / HELD_OUT]
        places = {folder: own}
        for run in (folder / MOVING, *older_runs(folder)):
            places[run] = [run, run / HELD_OUT]
        for run, folders in places.items():
            # A planned manifest is that of an encoding that goes on, or was interrupted.
            paths = [place / name for place in folders for name in (FILE_NAME, PLANNED)]
            there = [path for path in paths if path.is_file()]
            if there:
                found[run] = list(dict.fromkeys([*found.get(run, []), *there]))
    return found


def statistics(store: Store) -> Statistics:
    """Measure a store.

    Raises:
        StoreError: see `used_keys`.
    """
    sizes = store.collect(
        store.scan().unique(["key", "output"]).group_by("key").agg(pl.col("bytes").sum())
    )
    users = used_keys(store)
    named = [
        keys.with_columns(pl.lit(number, pl.UInt32).alias("user"))
        for number, keys in enumerate(users.values())
    ]
    none = pl.LazyFrame(schema={"key": pl.String, "user": pl.UInt32})
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
    found = {user: counts for user, *counts in table.iter_rows()}
    total = int(sizes["bytes"].sum())
    used = uses.unique("key").select(pl.col("bytes").sum()).collect().item()
    stored = store.collect(store.scan().select(pl.col("bytes").sum())).item()
    return Statistics(
        keys=sizes.height,
        bytes=total,
        used_bytes=int(used),
        duplicate_bytes=int(stored) - total,
        stray_files=len(_stray(store)),
        uses=[Use(f, *found.get(number, (0, 0, 0))) for number, f in enumerate(users)],
    )


def _stray(store: Store) -> list[Path]:
    """What no index names: shards of interrupted writers, and what is half written. Files of other names
    are not the store's."""
    indexed = {file.stem for file in store.index_files}
    shards = [path for path in store.shard_files if path.stem not in indexed]
    hidden = [p for place in ("shards", "index", "users") for p in (store.path / place).glob(".*")]
    return sorted([*shards, *(path for path in hidden if is_leftover(path.name))])


@dataclass(frozen=True)
class Collected:
    """What `collect` did."""

    removed_keys: int
    removed_files: int
    freed_bytes: int


def collect(store: Store) -> Collected:
    """Drop what no run folder uses, and every stray file.

    A shard of which little is used is written anew without the rest; one of which much is used
    stays as it is.

    Raises:
        StoreError: the store is in use; or none of its run folders is there; or damage leaves open
            what they use: see `used_keys`; or what is used is damaged.
        OutputError: the store cannot be written.
    """
    with store.in_use(alone=True):
        before = _size(store)
        users = used_keys(store)
        if store.lost_notes:
            raise StoreError(
                "it is not known of every run folder what it uses of this store: notes were damaged",
                where=", ".join(str(path) for path in store.lost_notes),
                do="start the trainings of its run folders once more, which writes the notes again; "
                "remove those that are left when every run folder is among the users in `stats`",
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
            if (
                int(rows["bytes"].sum()) * PART_OF_SHARD_KEPT <= int(kept["bytes"].sum())
                and kept.height
            ):
                continue
            _rewrite(store, file.stem, kept)
            removed.append(rows.join(used, on="key", how="anti")["key"].unique())
            files += 2
        keys = pl.concat(removed).n_unique() if removed else 0
        return Collected(keys, files, before - _size(store))


def _rewrite(store: Store, shard: str, kept: pl.DataFrame) -> None:
    """Write what is kept of a shard as a new one, then remove the old one."""
    path = store.path / "shards" / f"{shard}.safetensors"
    if kept.height:
        try:
            opened = OpenShard(path)
            with store.writer() as writer:
                for key, *named in kept.group_by("key").agg("output", "digest").iter_rows():
                    outputs = {output: opened.read(key, output) for output in named[0]}
                    # Or damage would get a digest of its own.
                    if [tensor_digest(tensor) for tensor in outputs.values()] != named[1]:
                        raise damaged(path, f"the index says something else of {key[:16]}…")
                    writer.add(key, outputs)
        except (OSError, SafetensorError) as error:
            raise damaged(path, f"the shard cannot be read: {error}") from error
    # Without its index a shard is not read: so first the index.
    (store.path / "index" / f"{shard}.parquet").unlink()
    path.unlink(missing_ok=True)


def _size(store: Store) -> int:
    folders = [store.path / "shards", store.path / "index"]
    return sum(p.stat().st_size for folder in folders for p in folder.rglob("*") if p.is_file())
