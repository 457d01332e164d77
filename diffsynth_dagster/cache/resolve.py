"""The manifest as a training reads it: where each sample lies, in files of fixed-size records.

    .samples.records  a record for each sample, samples of equal shape next to each other
    .samples.bin      the texts and lists of files that the training step reads, one after another
    .samples.json     buckets, shards, columns

The keys are looked up in the store once, for all samples together. The files are mapped into memory
by every process and worker of a node: a sample costs none of them a Python object.
"""

import json
import mmap
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import polars as pl
from numpy.typing import NDArray

from diffsynth_dagster.cache.keys import KEY_DIGITS
from diffsynth_dagster.cache.manifest import Manifest
from diffsynth_dagster.cache.store import Store
from diffsynth_dagster.errors import StoreError
from diffsynth_dagster.files import write_text, write_whole

RECORDS, TEXTS, FACTS = ".samples.records", ".samples.bin", ".samples.json"
_SHAPE = ("height", "width", "frames", "shape")
_SAMPLE_DIGITS = KEY_DIGITS + 11
"""Of `<identity>-<n>`, with n below 2 to the 32."""


@dataclass(frozen=True)
class _Facts:
    """What the records do not say.

    Attributes:
        store: folder of the store.
        digest: of the manifest.
        buckets: number of samples of each shape, in the order of the records.
        shards: names, by the numbers that the records hold.
        stages, inputs: the cached stages, and the columns that the step reads.
    """

    store: str
    digest: str
    buckets: list[int]
    shards: list[str]
    stages: list[str]
    inputs: list[str]


@dataclass(frozen=True)
class Sample:
    """Where one sample lies.

    Attributes:
        sample: its identity.
        row: its number in the metadata, from 1.
        places: stage → shard and key.
        inputs: column → text, or files as JSON.
    """

    sample: str
    row: int
    places: Mapping[str, tuple[str, str]]
    inputs: Mapping[str, str]


class Samples:
    """The resolved samples in a run folder. Copies for worker processes map the files anew."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._facts = _Facts(**json.loads((folder / FACTS).read_text(encoding="utf-8")))
        kind = _record_type(len(self._facts.stages), len(self._facts.inputs))
        self._records: Any = np.memmap(folder / RECORDS, kind, mode="r")
        with (folder / TEXTS).open("rb") as file:
            empty = file.seek(0, 2) == 0
            self._texts: Any = b"" if empty else mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
        self.store = Path(self._facts.store)
        self.buckets: Sequence[int] = self._facts.buckets
        self._starts = np.cumsum([0, *self.buckets])

    def __len__(self) -> int:
        return len(self._records)

    def tokens(self) -> NDArray[np.uint32]:
        """Patches of each sample's latents, in the order of the records."""
        return cast("NDArray[np.uint32]", self._records["tokens"])

    def at(self, bucket: int, index: int) -> Sample:
        """A sample by its bucket and its place in it."""
        record = self._records[int(self._starts[bucket]) + index]
        inputs: dict[str, str] = {}
        for number, column in enumerate(self._facts.inputs):
            start, length = int(record["at"][number]), int(record["length"][number])
            inputs[column] = self._texts[start : start + length].decode("utf-8")
        return Sample(
            record["sample"].decode(),
            int(record["row"]),
            {
                stage: (self._facts.shards[record["shard"][n]], record["key"][n].decode())
                for n, stage in enumerate(self._facts.stages)
            },
            inputs,
        )

    def __reduce__(self) -> Any:
        return Samples, (self._folder,)


def resolve(manifest: Manifest, folder: Path) -> Samples:
    """Look up where the samples of a manifest lie, and write it into the folder of a training.

    Raises:
        StoreError: the store lacks a sample, or holds one with NaN or infinity.
        OutputError: the run folder cannot be written.
    """
    names = manifest.rows.collect_schema().names()
    stages = [n.removeprefix("key:") for n in names if n.startswith("key:")]
    inputs = [n.removeprefix("input:") for n in names if n.startswith("input:")]
    store = Store(Path(manifest.store))
    shards = [file.stem for file in store.index_files]
    _require_finite(manifest, store)
    places = {stage: _shard_numbers(manifest, store, stage, shards) for stage in stages}
    buckets = _buckets(manifest)
    sizes: list[int] = buckets["len"].to_list()

    def write(records: Path) -> None:
        fill = partial(_write_records, manifest, places, buckets, records)
        write_whole(folder / TEXTS, fill)

    write_whole(folder / RECORDS, write)
    facts = _Facts(manifest.store, manifest.digest, sizes, shards, stages, inputs)
    write_text(folder / FACTS, json.dumps(asdict(facts)))
    return Samples(folder)


def _write_records(
    manifest: Manifest,
    places: Mapping[str, NDArray[np.uint32]],
    buckets: pl.DataFrame,
    records: Path,
    texts: Path,
) -> None:
    """Write the records of a manifest bucket after bucket, and their texts in any order.

    The manifest is read once, in batches: what a batch adds to a bucket is written behind what the
    bucket has already.
    """
    names = manifest.rows.collect_schema().names()
    inputs = [n.removeprefix("input:") for n in names if n.startswith("input:")]
    kind = _record_type(len(places), len(inputs))
    ends = np.cumsum([0, *buckets["len"]])[:-1]
    done = written = 0
    with records.open("wb") as file, texts.open("wb") as text_file:
        for batch in manifest.rows.collect_batches(maintain_order=True):
            made, text = _records(batch, kind, [*places], inputs, written)
            for number, shard in enumerate(places.values()):
                made["shard"][:, number] = shard[done : done + batch.height]
            numbered = batch.join(buckets, on=_SHAPE, how="left", maintain_order="left")
            bucket = numbered["bucket"].to_numpy()
            for own in np.unique(bucket):
                added = made[bucket == own]
                file.seek(int(ends[own]) * kind.itemsize)
                file.write(added.tobytes())
                ends[own] += len(added)
            text_file.write(text)
            done, written = done + batch.height, written + len(text)


def _record_type(stages: int, inputs: int) -> np.dtype[Any]:
    return np.dtype(
        [
            ("sample", f"S{_SAMPLE_DIGITS}"),
            ("row", "<u4"),
            ("tokens", "<u4"),
            ("key", f"S{KEY_DIGITS}", (stages,)),
            ("shard", "<u4", (stages,)),
            ("at", "<u8", (inputs,)),
            ("length", "<u4", (inputs,)),
        ]
    )


def _records(
    batch: pl.DataFrame, kind: np.dtype[Any], stages: Sequence[str], inputs: Sequence[str], at: int
) -> tuple[Any, bytes]:
    """Records of a batch of the manifest's rows, and their texts.

    Args:
        at: where the texts begin in their file.
    """
    records: Any = np.zeros(batch.height, dtype=kind)
    records["sample"] = _fixed(batch["sample"], _SAMPLE_DIGITS)
    records["row"] = batch["row"].to_numpy()
    records["tokens"] = batch["tokens"].to_numpy()
    for number, stage in enumerate(stages):
        records["key"][:, number] = _fixed(batch[f"key:{stage}"], KEY_DIGITS)
    parts: list[bytes] = []
    for number, column in enumerate(inputs):
        texts = batch[f"input:{column}"]
        lengths = texts.str.len_bytes().to_numpy().astype(np.int64)
        records["length"][:, number] = lengths
        records["at"][:, number] = at + np.cumsum(lengths) - lengths
        parts.append(texts.str.join("").item().encode("utf-8"))
        at += len(parts[-1])
    return records, b"".join(parts)


def _fixed(texts: pl.Series, size: int) -> Any:
    """ASCII texts of at most `size` characters as an array of bytes of that size."""
    padded = texts.str.pad_end(size, "\0").str.join("").item().encode("ascii")
    return np.frombuffer(padded, dtype=f"S{size}")


def _buckets(manifest: Manifest) -> pl.DataFrame:
    """The shapes of the samples in order of size: `_SHAPE`, `len` and number (`bucket`) of each."""
    counted = manifest.rows.group_by(_SHAPE).len().collect(engine="streaming").sort(_SHAPE)
    return counted.with_row_index("bucket")


def _shard_numbers(
    manifest: Manifest, store: Store, stage: str, shards: Sequence[str]
) -> NDArray[np.uint32]:
    """For each row of the manifest the number of the shard that holds its outputs of a stage.

    Raises:
        StoreError: the store lacks some.
    """
    stored = store.scan().filter(pl.col("output") == manifest.outputs[stage])
    numbered = pl.LazyFrame(
        {"shard": shards, "number": range(len(shards))},
        schema={"shard": pl.String, "number": pl.UInt32},
    )
    places = stored.select("key", "shard").join(numbered, on="shard").select("key", "number")
    keys = manifest.rows.select(pl.col(f"key:{stage}").alias("key")).with_row_index("index")
    found = keys.join(places, on="key", how="left", maintain_order="left")
    numbers = store.collect(found.select("index", "number"))
    if numbers.height > manifest.samples:  # keys that two writers wrote: either will do
        numbers = numbers.unique("index", keep="first", maintain_order=True)
    if numbers["number"].has_nulls():
        raise lacking(numbers["number"].null_count(), manifest.samples, manifest.store)
    return numbers["number"].to_numpy()


def _require_finite(manifest: Manifest, store: Store) -> None:
    """Refuse samples whose encoded inputs hold NaN or infinity. (Those that are encoded now are
    refused before they are stored.) Raises `StoreError`."""
    broken = store.collect(store.scan().filter(~pl.col("finite")).select("key").unique())
    if not broken.height:
        return
    keys = pl.concat_list(pl.col("^key:.*$")).alias("key")
    used = (
        manifest.rows.select("row", keys).explode("key").join(broken.lazy(), on="key", how="semi")
    )
    rows = used.select(pl.col("row").unique().sort()).collect()["row"].to_list()
    if rows:
        more = f" and {len(rows) - 5} more" if len(rows) > 5 else ""
        raise StoreError(
            f"what rows {', '.join(map(str, rows[:5]))}{more} are encoded to holds NaN or infinity",
            where=manifest.store,
            do="take them out of the table, or encode with another mixed_precision",
        )


def lacking(missing: int, wanted: int, store: str) -> StoreError:
    """The error for a store that lacks inputs of a training."""
    return StoreError(
        f"the store lacks {missing} of {wanted} encoded inputs",
        where=store,
        do="encode it first: materialize the latents, or run the task with :data_process and the same "
        "parameters",
    )
