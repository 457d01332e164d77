"""Fill the store: run the cacheable stages over the samples whose keys it lacks."""

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
"""Samples whose rows are fetched together from the checked table."""
_SHAPE = ("width", "height", "frames", "shape")


class Ranks(Protocol):
    """What encoding needs to know of the processes of a job."""

    @property
    def process_index(self) -> int: ...
    @property
    def num_processes(self) -> int: ...
    def wait_for_everyone(self) -> None: ...


@dataclass
class EncodeReport:
    """How many samples of each stage were in the store, and how many were encoded."""

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
    """Run each cached stage over the samples that the store lacks.

    Every process encodes its share and writes shards of its own. Components are freed after the
    last stage that uses them.

    A batch of other samples may round otherwise. So that a run that was killed and goes on stores the same
    bytes under every key as one that was not, a process cuts its share, sorted, into batches from the
    front, and a batch is stored as a whole or not at all: what is left is cut as before. That holds for
    the same samples, `batch_size` and number of processes; samples that are added later are batched
    among themselves.

    Args:
        progress: called with (stage, samples done, samples to do) of this process.
        warn: called when a stage will need more space than is free, by its first batch.

    Raises:
        MetadataError: a file is no longer what was checked, or what a row is encoded to is not finite.
            What was encoded before it is kept.
        OutputError: the store cannot be written.
    """
    family = models.resolved.family
    store = Store(Path(manifest.store))
    report = EncodeReport()
    cached = [stage for stage in models.resolved.cached_stages if stage.name in manifest.outputs]
    captions = captions_of(config, family)
    for number, stage in enumerate(cached):
        wanted = _wanted(stage, manifest)
        missing = _missing(wanted, stage, store)
        report.misses[stage.name] = missing.height
        report.hits[stage.name] = _count(wanted) - missing.height
        ranks.wait_for_everyone()
        share = _with_places(_share(missing, ranks), stage, store)
        needed = [family.stage(name) for name in stage.needs]
        if share.height:
            loaded = models.get(stage.uses)
            with store.writer() as writer, torch.no_grad():
                done = 0
                told = captions if captions is not None and captions.told(stage) else None
                for batch in _batches(share, stage, table, config.batch_size, told):
                    samples = _read_samples(stage, batch, store, needed)
                    made = [stage.to_store(outputs) for outputs in stage.run(loaded, samples)]
                    for row, stored in zip(batch, made, strict=True):
                        _require_finite(stage, row, stored)
                    writer.add_batch({r["key"]: t for r, t in zip(batch, made, strict=True)})
                    if not done:
                        _warn_of_space(stage, batch, made, missing, store, warn)
                    done += len(batch)
                    progress(stage.name, done, share.height)
            del loaded  # or it would keep what is freed
            later = {name for s in cached[number + 1 :] for name in s.uses}
            models.free(name for name in stage.uses if name not in later)
        ranks.wait_for_everyone()
    return report


def _warn_of_space(
    stage: Stage,
    batch: Sequence[Mapping[str, Any]],
    made: Sequence[Tensors],
    missing: pl.DataFrame,
    store: Store,
    warn: Callable[[str], None],
) -> None:
    """Warn where all that a stage will encode does not fit on the disk, by what its first batch takes.

    Args:
        batch: the first rows that were encoded, to `made`.
        missing: all that will be, by every process.
    """
    of_files = any(item.is_file for item in stage.reads)
    # What is made of a picture or a clip grows with it; what is made of a text does not.
    units = max(1, int(missing["tokens"].sum())) if of_files else missing.height
    done = max(1, sum(row["tokens"] for row in batch)) if of_files else len(batch)
    size = sum(tensor.nbytes for stored in made for tensor in stored.values())
    expected = size * units // done
    warning = short_of_space(store.path, expected, f"what '{stage.name}' encodes")
    if warning is not None:
        warn(warning)


def _require_finite(stage: Stage, row: Mapping[str, Any], stored: Tensors) -> None:
    """Refuse a row that is encoded to NaN or infinity, which nothing can be trained on.

    Raises:
        MetadataError: it names the row and its files.
    """
    if all(is_finite(tensor) for tensor in stored.values()):
        return
    said = [
        row[f"{item.column}:path"] if item.is_file else row[item.column] for item in stage.reads
    ]
    raise MetadataError(
        f"what '{stage.name}' makes of {', '.join(shown(each) for each in said)} holds NaN or infinity",
        where=f"row {row['row']}" if row["row"] else "sample_prompts",
        do="if other rows do too, give a mixed_precision with a wider range (bf16, or no); else take "
        "the row out",
    )


def _wanted(stage: Stage, manifest: Manifest) -> pl.LazyFrame:
    """What a stage has to yield: `key`, the `row` that yields it (0 for a prompt of a sample image),
    its `prompt`, or which `caption` of the row it is, counted from 0 (null where the stage depends on
    none, or the row has one alone), its shape, and `needs:<stage>`, keys of the stages it needs."""
    key = f"key:{stage.name}"
    needs = [pl.col(f"key:{name}").alias(f"needs:{name}") for name in stage.needs]
    listed = manifest.listed
    of_row = pl.lit(None, pl.Int64)
    if key in listed:
        of_row = pl.int_ranges(pl.col(key).list.len().cast(pl.Int64))
    rows = manifest.rows.select(
        pl.col(key).alias("key"),
        "row",
        pl.lit(None, pl.String).alias("prompt"),
        of_row.alias("caption"),
        *_SHAPE,
        "tokens",
        *needs,
    )
    if key in listed:
        rows = rows.explode(
            "key", "caption", *(f"needs:{n}" for n in stage.needs if f"key:{n}" in listed)
        )
    prompts = [
        {
            "key": keys[stage.name],
            "prompt": prompt,
            **{f"needs:{name}": keys[name] for name in stage.needs},
        }
        for prompt, keys in manifest.prompts.items()
        if stage.name in keys
    ]
    alone = {"row": 0, "width": 0, "height": 0, "frames": 0, "shape": "", "tokens": 0}
    schema = rows.collect_schema()
    more = pl.LazyFrame([{**alone, **p} for p in prompts], schema=schema)
    return pl.concat([rows, more])


def _count(wanted: pl.LazyFrame) -> int:
    """How many different keys there are, by their first 64 bits."""
    start = pl.col("key").str.slice(0, 16).str.to_integer(base=16, dtype=pl.UInt64)
    return int(wanted.select(start.n_unique()).collect(engine="streaming").item())


def _missing(wanted: pl.LazyFrame, stage: Stage, store: Store) -> pl.DataFrame:
    """What of it the store lacks, each key once."""
    stored = store.scan().filter(pl.col("output") == stage.yields[0].name).select("key")
    missing = wanted.join(stored, on="key", how="anti", maintain_order="left")
    return store.collect(missing).unique("key", keep="first", maintain_order=True)


def _share(missing: pl.DataFrame, ranks: Ranks) -> pl.DataFrame:
    """What this process encodes, samples of equal shape together.

    It is chosen by key and not by place in the list: another run may have added to the store
    between the looks of two processes.
    """
    number = pl.col("key").str.slice(0, 8).str.to_integer(base=16, dtype=pl.UInt64)
    mine = missing.filter(number % ranks.num_processes == ranks.process_index)
    return mine.sort(*_SHAPE, "key")


def _with_places(share: pl.DataFrame, stage: Stage, store: Store) -> pl.DataFrame:
    """The samples with `shard:<stage>`, where the store holds each stage that this one needs."""
    for name in stage.needs:
        keys = share.lazy().select(pl.col(f"needs:{name}").alias("key")).unique()
        places = store.places(keys).rename({"key": f"needs:{name}", "shard": f"shard:{name}"})
        share = share.join(places, on=f"needs:{name}", how="left", maintain_order="left")
    return share


def _batches(
    share: pl.DataFrame, stage: Stage, table: CheckedTable, size: int, captions: Captions | None
) -> Iterator[list[dict[str, Any]]]:
    """Runs of at most `size` samples of equal shape, each with the columns that the stage reads.

    Args:
        captions: those of the rows, where they may have several and the stage depends on them.
    """
    columns = [i.column for i in stage.reads if not i.is_file]
    columns += [f"{i.column}:{part}" for i in stage.reads if i.is_file for part in PARTS]
    read = [pl.col("row").cast(share.schema["row"]), *columns]
    batch: list[dict[str, Any]] = []
    for chunk in share.iter_slices(_AT_ONCE):
        wanted = chunk.select("row").unique()
        said = table.accepted.join(wanted.lazy(), on="row", how="semi").select(read).collect()
        # A sample image has a prompt and no row; the table may have a column of this name too.
        both = chunk.join(said, on="row", how="left", maintain_order="left", suffix=":said")
        if captions is not None and f"{captions.column}:said" in both.columns:
            both = captions.with_told(both, f"{captions.column}:said")
        if "prompt:said" in both.columns:
            both = both.with_columns(pl.coalesce("prompt", "prompt:said").alias("prompt"))
        for row in both.iter_rows(named=True):
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
    """The inputs of a stage: files are decoded in threads.

    Args:
        needed: the stages that it needs.
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

    with ThreadPoolExecutor(max_workers=min(8, len(rows))) as pool:
        return list(pool.map(read, rows))
