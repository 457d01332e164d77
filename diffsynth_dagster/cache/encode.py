"""Fill the store: run the cached stages on the samples whose keys it lacks."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import polars as pl
import torch

from diffsynth_dagster.cache.captions import Captions, captions_of
from diffsynth_dagster.cache.manifest import Manifest
from diffsynth_dagster.cache.store import Store
from diffsynth_dagster.config.parameters import TrainingConfig
from diffsynth_dagster.data.samples import PARTS, files_of, load_files, parse_value
from diffsynth_dagster.data.table.validate import CheckedTable
from diffsynth_dagster.errors import MetadataError, shown
from diffsynth_dagster.families.contract import Sample, Stage, Tensors
from diffsynth_dagster.files import short_of_space
from diffsynth_dagster.weights.load import is_finite
from diffsynth_dagster.weights.models import Models

_AT_ONCE = 1 << 14
"""Number of samples whose rows are fetched from the checked table in one query."""
_SHAPE = ("width", "height", "frames", "shape")
"""The columns in which the samples of a batch are equal."""


class Ranks(Protocol):
    """What encoding needs to know about the processes of a job."""

    @property
    def process_index(self) -> int: ...
    @property
    def num_processes(self) -> int: ...
    def wait_for_everyone(self) -> None: ...


@dataclass
class EncodeReport:
    """Stage → number of samples that the store already had (hits), or lacked (misses)."""

    hits: dict[str, int] = field(default_factory=dict)
    misses: dict[str, int] = field(default_factory=dict)


def encode_missing(
    config: TrainingConfig,
    models: Models,
    manifest: Manifest,
    table: CheckedTable,
    ranks: Ranks,
    progress: Callable[[str, int, int], None] = lambda stage, done, total: None,
    warn: Callable[[str], None] = lambda warning: None,
) -> EncodeReport:
    """Run each cached stage on the samples that the store lacks.

    Every process encodes its share and writes its own shards. Components are freed after the last
    stage that uses them.

    Rounding may depend on which samples share a batch. Each process sorts its share, cuts it into
    batches from the front, and stores a batch as a whole: so a run that was killed goes on with the
    same batches, for the same samples, `batch_size` and number of processes.

    Args:
        progress: called with (stage, samples done, samples to do) of this process.
        warn: called if a stage's first batch shows that it will need more space than is free.

    Raises:
        MetadataError: a file has changed since it was checked, or a row gives NaN or infinity.
        OutputError: the store cannot be written.
    """
    family, report = models.resolved.family, EncodeReport()
    store = Store(Path(manifest.store))
    cached = [stage for stage in models.resolved.cached_stages if stage.name in manifest.outputs]
    captions = captions_of(config, family)
    for number, stage in enumerate(cached):
        requested = _requested(stage, manifest)
        missing = _missing(requested, stage, store)
        report.misses[stage.name] = missing.height
        report.hits[stage.name] = _count(requested) - missing.height
        # All processes look before any of them writes, so that each knows how many are missing.
        ranks.wait_for_everyone()
        share = _with_shards(_share(missing, ranks), stage, store)
        needed = [family.stage(name) for name in stage.needs]
        if share.height:
            loaded = models.get(stage.uses)
            with store.writer() as writer, torch.no_grad():
                done = 0
                own_captions = captions if captions is not None and captions.told(stage) else None
                for batch in _batches(share, stage, table, config.batch_size, own_captions):
                    samples = _read_samples(stage, batch, store, needed)
                    encoded = [stage.to_store(outputs) for outputs in stage.run(loaded, samples)]
                    for row, stored in zip(batch, encoded, strict=True):
                        _require_finite(stage, row, stored, table)
                    writer.add_batch({r["key"]: t for r, t in zip(batch, encoded, strict=True)})
                    if not done:
                        _warn_of_space(stage, batch, encoded, missing, store, warn)
                    done += len(batch)
                    progress(stage.name, done, share.height)
            del loaded  # or it would keep the memory of what is freed
            later = {name for s in cached[number + 1 :] for name in s.uses}
            models.free(name for name in stage.uses if name not in later)
        # The next stage may need outputs that another process encoded.
        ranks.wait_for_everyone()
    return report


def _warn_of_space(
    stage: Stage,
    batch: Sequence[Mapping[str, Any]],
    encoded: Sequence[Tensors],
    missing: pl.DataFrame,
    store: Store,
    warn: Callable[[str], None],
) -> None:
    """Warn if a stage's outputs will not fit on the disk, as estimated from its first batch.

    Args:
        batch: the rows of the first batch.
        encoded: their outputs.
        missing: all samples that the stage will encode, in every process.
    """
    of_files = any(item.is_file for item in stage.reads)
    # Latents of a picture or a clip grow with its tokens; the size of an encoded text does not.
    units = max(1, int(missing["tokens"].sum())) if of_files else missing.height
    done = max(1, sum(row["tokens"] for row in batch)) if of_files else len(batch)
    size = sum(tensor.nbytes for stored in encoded for tensor in stored.values())
    expected = size * units // done
    warning = short_of_space(store.path, expected, f"what '{stage.name}' encodes")
    if warning is not None:
        warn(warning)


def _require_finite(
    stage: Stage, row: Mapping[str, Any], stored: Tensors, table: CheckedTable
) -> None:
    """Refuse a row that is encoded to NaN or infinity: one such row spoils a training.

    Raises:
        MetadataError: the row is; the message names it and its files.
    """
    if all(is_finite(tensor) for tensor in stored.values()):
        return
    inputs = [
        row[f"{item.column}:path"] if item.is_file else row[item.column] for item in stage.reads
    ]
    raise MetadataError(
        f"what '{stage.name}' makes of {', '.join(shown(value) for value in inputs)} holds NaN or "
        "infinity",
        where=f"row {row['row']} of {table.source}",
        do="if other rows do too, give a mixed_precision with a wider range (bf16, or no); else "
        "take the row out",
    )


def _requested(stage: Stage, manifest: Manifest) -> pl.LazyFrame:
    """The samples that a manifest needs from a stage, stored or not.

    Returns:
        One row per sample:
            key: the sample's key for this stage.
            row: its row in the table.
            caption: the index of the row's caption; null if rows have one caption, or if the stage
                does not depend on it.
            width, height, frames, shape, tokens: as in the manifest.
            needs:<stage>: its key for each stage that this one needs.
    """
    key = f"key:{stage.name}"
    needs = [pl.col(f"key:{name}").alias(f"needs:{name}") for name in stage.needs]
    listed = manifest.listed
    caption = pl.lit(None, pl.Int64)
    if key in listed:
        caption = pl.int_ranges(pl.col(key).list.len().cast(pl.Int64))
    rows = manifest.rows.select(
        pl.col(key).alias("key"),
        "row",
        caption.alias("caption"),
        *_SHAPE,
        "tokens",
        *needs,
    )
    if key in listed:
        # A needed stage that does not depend on the caption has one key, which is repeated.
        rows = rows.explode(
            "key", "caption", *(f"needs:{n}" for n in stage.needs if f"key:{n}" in listed)
        )
    return rows


def _count(requested: pl.LazyFrame) -> int:
    """Number of different keys, told apart by their first 64 bits.

    As integers, ten million keys need a fraction of the memory of strings; the number is only
    reported, so a collision does no harm.
    """
    start = pl.col("key").str.slice(0, 16).str.to_integer(base=16, dtype=pl.UInt64)
    return int(requested.select(start.n_unique()).collect(engine="streaming").item())


def _missing(requested: pl.LazyFrame, stage: Stage, store: Store) -> pl.DataFrame:
    """The samples that the store lacks, each key once."""
    # Outputs of a key are stored together, so it is enough to look for the first.
    stored = store.scan().filter(pl.col("output") == stage.yields[0].name).select("key")
    missing = requested.join(stored, on="key", how="anti", maintain_order="left")
    return store.collect(missing).unique("key", keep="first", maintain_order=True)


def _share(missing: pl.DataFrame, ranks: Ranks) -> pl.DataFrame:
    """The samples that this process encodes, sorted so that equal shapes are next to each other."""
    # Chosen by key, not by position: another run may add to the store while the processes of this
    # one read its index, so their lists can differ.
    number = pl.col("key").str.slice(0, 8).str.to_integer(base=16, dtype=pl.UInt64)
    mine = missing.filter(number % ranks.num_processes == ranks.process_index)
    return mine.sort(*_SHAPE, "key")


def _with_shards(share: pl.DataFrame, stage: Stage, store: Store) -> pl.DataFrame:
    """Add a column `shard:<stage>` for each needed stage: the shard that holds its outputs."""
    for name in stage.needs:
        keys = share.lazy().select(pl.col(f"needs:{name}").alias("key")).unique()
        places = store.places(keys).rename({"key": f"needs:{name}", "shard": f"shard:{name}"})
        share = share.join(places, on=f"needs:{name}", how="left", maintain_order="left")
    return share


def _batches(
    share: pl.DataFrame, stage: Stage, table: CheckedTable, size: int, captions: Captions | None
) -> Iterator[list[dict[str, Any]]]:
    """Batches of at most `size` samples of equal shape, with the columns that the stage reads.

    Args:
        captions: how rows are captioned, if they may have several captions and the stage depends
            on the caption.
    """
    columns = [i.column for i in stage.reads if not i.is_file]
    columns += [f"{i.column}:{part}" for i in stage.reads if i.is_file for part in PARTS]
    read = [pl.col("row").cast(share.schema["row"]), *columns]
    batch: list[dict[str, Any]] = []
    for chunk in share.iter_slices(_AT_ONCE):
        numbers = chunk.select("row").unique()
        rows = table.accepted.join(numbers.lazy(), on="row", how="semi").select(read).collect()
        samples = chunk.join(rows, on="row", how="left", maintain_order="left")
        if captions is not None and captions.column in samples.columns:
            samples = captions.with_told(samples, captions.column)
        for row in samples.iter_rows(named=True):
            # Not cut at the end of a chunk, so that batches do not depend on `_AT_ONCE`.
            if batch and (len(batch) == size or _shape(row) != _shape(batch[0])):
                yield batch
                batch = []
            batch.append(row)
    if batch:
        yield batch


def _shape(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row[name] for name in _SHAPE)


def _read_samples(
    stage: Stage, rows: Sequence[dict[str, Any]], store: Store, needed: Sequence[Stage]
) -> list[Sample]:
    """Read the inputs of a stage; files are decoded in threads.

    Args:
        needed: the stages whose stored outputs the stage reads.
    """

    def read(row: dict[str, Any]) -> Sample:
        sample: dict[str, Any] = {}
        for item in stage.reads:
            if item.is_file:
                sample[item.column] = load_files(files_of(row, item), item, row["row"])
            else:
                sample[item.column] = parse_value(row[item.column], item)
        for other in needed:
            shard, key = row[f"shard:{other.name}"], row[f"needs:{other.name}"]
            names = [output.name for output in other.yields]
            sample |= other.from_store(store.read_from(shard, key, names))
        return sample

    # Threads are enough: the decoders release the interpreter's lock.
    with ThreadPoolExecutor(max_workers=min(8, len(rows))) as pool:
        return list(pool.map(read, rows))
