"""The manifest in the form that a training reads: files of fixed-size records.

    .samples.records  a record for each sample, samples of equal shape next to each other
    .samples.bin      the texts and lists of files that the training step reads, one after another
    .samples.captions a record for each caption of each sample, if samples may have several
    .samples.json     buckets, shards, columns

For the held-out samples and those compared with them, the files have the names `.held_out.…` and
`.compared.…`.

`resolve` looks up the shards of all samples in the store once, and writes these files. The
processes and data-loading workers of a node map them into memory. So they share one copy, and no
sample is a Python object until it is read.
"""

import json
import mmap
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import polars as pl
from numpy.typing import NDArray

from diffsynth_dagster.cache.manifest import Manifest
from diffsynth_dagster.cache.records import (
    Columns,
    buckets_of,
    columns_of,
    place_type,
    record_type,
    write_records,
)
from diffsynth_dagster.cache.store import Store
from diffsynth_dagster.data.table.rows import REPEAT
from diffsynth_dagster.errors import StoreError
from diffsynth_dagster.files import write_text, write_whole


@dataclass(frozen=True)
class _Facts:
    """The content of `.samples.json`.

    Attributes:
        store: folder of the store.
        digest: digest of the manifest.
        buckets: number of samples of each bucket, in the order of the records.
        pixels: number of pixels of a picture or frame of each bucket.
        shards: names of the shards; the records hold indices into this list.
        columns: the stages and columns of the records.
        repeats: how often each bucket is visited in an epoch; empty if each is visited once.
    """

    store: str
    digest: str
    buckets: list[int]
    pixels: list[int]
    shards: list[str]
    columns: Columns
    repeats: list[int]


@dataclass(frozen=True)
class Told:
    """The part of a sample that depends on its caption; for the attributes see `Sample`."""

    places: Mapping[str, tuple[str, str]]
    inputs: Mapping[str, str]


@dataclass(frozen=True)
class Sample:
    """What a training needs to know in order to read a sample.

    Attributes:
        sample: its identity.
        row: its row in the metadata, from 1.
        place: the number of its record.
        places: stage → shard and key of its outputs.
        inputs: column → text, or files as JSON.
        captions: if samples may have several captions: what depends on each of them.
    """

    sample: str
    row: int
    place: int
    places: Mapping[str, tuple[str, str]]
    inputs: Mapping[str, str]
    captions: tuple[Told, ...] = ()

    def told(self, number: int) -> "Sample":
        """The sample with only one of its captions, counted from 0. A sample of a data set with one
        caption each is returned as it is."""
        if not self.captions:
            return self
        caption = self.captions[number]
        places, inputs = {**self.places, **caption.places}, {**self.inputs, **caption.inputs}
        return replace(self, places=places, inputs=inputs, captions=())


class Samples:
    """The resolved samples in a run folder.

    Args:
        name: the name of the files, without dot and suffix; see the module.
    """

    def __init__(self, folder: Path, name: str = "samples") -> None:
        self._folder, self._name = folder, name
        records, texts, captions, facts_file = _files(folder, name)
        facts = json.loads(facts_file.read_text(encoding="utf-8"))
        columns = Columns(**facts.pop("columns"))
        self._facts = _Facts(**facts, columns=columns)
        kind = record_type(len(columns.stages), len(columns.inputs), columns.has_captions)
        self._records: Any = np.memmap(records, kind, mode="r")
        if columns.has_captions:
            kind = place_type(len(columns.told_stages), len(columns.told_inputs))
            self._captions: Any = np.memmap(captions, kind, mode="r")
        with texts.open("rb") as file:
            empty = file.seek(0, 2) == 0  # which `mmap` refuses
            self._texts: Any = b"" if empty else mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
        self.store = Path(self._facts.store)
        self.buckets: Sequence[int] = self._facts.buckets
        self.repeats: Sequence[int] = self._facts.repeats
        self._starts = np.cumsum([0, *self.buckets])  # number of the first record of each bucket

    def __len__(self) -> int:
        return len(self._records)

    def tokens(self) -> NDArray[np.uint32]:
        """Number of patches of each sample's latents, (samples,), in the order of the records."""
        return cast("NDArray[np.uint32]", self._records["tokens"])

    def pixels(self, bucket: int) -> int:
        """Number of pixels of a bucket's pictures, or of a frame of its clips."""
        return self._facts.pixels[bucket]

    def rows(self) -> NDArray[np.uint32]:
        """Row of each sample in the metadata, (samples,), in the order of the records."""
        return cast("NDArray[np.uint32]", self._records["row"])

    def tokens_at(self, bucket: int, index: int) -> int:
        """Number of patches of a sample's latents, by its bucket and its index in the bucket."""
        return int(self._records["tokens"][int(self._starts[bucket]) + index])

    def at(self, bucket: int, index: int) -> Sample:
        """A sample, by its bucket and its index in the bucket."""
        columns, place = self._facts.columns, int(self._starts[bucket]) + index
        record = self._records[place]
        captions: list[Told] = []
        if columns.has_captions:
            first, count = int(record["captions_at"]), int(record["captions"])
            captions = [
                Told(*self._places(caption, columns.told_stages, columns.told_inputs))
                for caption in self._captions[first : first + count]
            ]
        places, inputs = self._places(record, columns.stages, columns.inputs)
        return Sample(
            record["sample"].decode(), int(record["row"]), place, places, inputs, tuple(captions)
        )

    def _places(
        self, record: Any, stages: Sequence[str], inputs: Sequence[str]
    ) -> tuple[dict[str, tuple[str, str]], dict[str, str]]:
        """From a record, `places` and `inputs` as `Sample` has them."""
        texts: dict[str, str] = {}
        for number, column in enumerate(inputs):
            start, length = int(record["at"][number]), int(record["length"][number])
            texts[column] = self._texts[start : start + length].decode("utf-8")
        places = {
            stage: (self._facts.shards[record["shard"][n]], record["key"][n].decode())
            for n, stage in enumerate(stages)
        }
        return places, texts

    def __reduce__(self) -> Any:
        # A worker process maps the files itself: memory maps cannot be pickled.
        return Samples, (self._folder, self._name)


def _files(folder: Path, name: str) -> list[Path]:
    return [folder / f".{name}.{kind}" for kind in ("records", "bin", "captions", "json")]


def resolve(manifest: Manifest, folder: Path, name: str = "samples") -> Samples:
    """Look up the shards of a manifest's samples, and write the files that a training reads.

    Args:
        folder: the files are written here.
        name: the name of the files, without dot and suffix; see the module.

    Raises:
        StoreError: the store lacks a sample, or holds one with NaN or infinity.
        OutputError: the run folder cannot be written.
    """
    columns = columns_of(manifest)
    store = Store(Path(manifest.store))
    shards = [file.stem for file in store.index_files]
    _require_finite(manifest, store)
    places = {
        stage: _shard_numbers(manifest, store, stage, shards)
        for stage in (*columns.stages, *columns.told_stages)
    }
    buckets = buckets_of(manifest.rows)
    sizes: list[int] = buckets["len"].to_list()

    records_file, texts, captions_file, facts_file = _files(folder, name)

    # One pass over the manifest fills all the files, so the calls of `write_whole` are nested.
    def write(records: Path, captions: Path | None = None) -> None:
        fill = partial(write_records, manifest, columns, places, buckets, records, captions)
        write_whole(texts, fill)

    def write_with_captions(records: Path) -> None:
        write_whole(captions_file, lambda captions: write(records, captions))

    write_whole(records_file, write_with_captions if columns.has_captions else write)
    pixels: list[int] = (buckets["width"] * buckets["height"]).to_list()
    repeats: list[int] = buckets[REPEAT].to_list() if REPEAT in buckets.columns else []
    facts = _Facts(manifest.store, manifest.digest, sizes, pixels, shards, columns, repeats)
    write_text(facts_file, json.dumps(asdict(facts)))
    return Samples(folder, name)


def _shard_numbers(
    manifest: Manifest, store: Store, stage: str, shards: Sequence[str]
) -> NDArray[np.uint32]:
    """Find the shards that hold a stage's outputs.

    Returns:
        An index into `shards` for each row of the manifest, or, if the stage depends on the
        caption, for each caption of each row.

    Raises:
        StoreError: the store lacks some outputs.
    """
    stored = store.scan().filter(pl.col("output") == manifest.outputs[stage])
    # Numbers instead of names: 4 bytes for each sample instead of a string of 32 characters.
    numbered = pl.LazyFrame(
        {"shard": shards, "number": range(len(shards))},
        schema={"shard": pl.String, "number": pl.UInt32},
    )
    places = stored.select("key", "shard").join(numbered, on="shard").select("key", "number")
    key = pl.col(f"key:{stage}")
    keys = manifest.rows.select(
        (key.explode() if key.meta.output_name() in manifest.listed else key).alias("key")
    ).with_row_index("index")
    joined = keys.join(places, on="key", how="left", maintain_order="left")
    numbers = store.collect(joined.select("index", "number"))
    # If two writers stored the same key, the join has two rows for it: either shard will do.
    if not numbers["index"].is_unique().all():
        numbers = numbers.unique("index", keep="first", maintain_order=True)
    if numbers["number"].has_nulls():
        raise lacking(numbers["number"].null_count(), manifest.samples, manifest.store)
    return numbers["number"].to_numpy()


def _require_finite(manifest: Manifest, store: Store) -> None:
    """Refuse stored samples with NaN or infinity. Raises `StoreError`."""
    # Encoding refuses them today, but a store may hold some from before it did.
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
    """The error for a store that lacks encoded samples of a training."""
    return StoreError(
        f"the store lacks {missing} of {wanted} encoded inputs",
        where=store,
        do="encode it first: materialize the latents, or run the task with :data_process and the "
        "same parameters",
    )
