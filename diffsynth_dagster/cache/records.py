"""Files of fixed-size records that say where each sample of a manifest is; see `cache.resolve`.

The record of a sample can be found by its number alone, so the files are mapped into memory and
nothing is loaded per sample.
"""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from diffsynth_dagster.cache.keys import KEY_DIGITS
from diffsynth_dagster.cache.manifest import Manifest
from diffsynth_dagster.data.table.rows import REPEAT

_SHAPE = ("height", "width", "frames", "shape")
_SAMPLE_DIGITS = KEY_DIGITS + 11
"""Length of `<identity>-<n>`, with n below 2^32."""


@dataclass(frozen=True)
class Columns:
    """The stages and columns that the records describe. It is stored in `.samples.json`.

    Attributes:
        stages: cached stages that do not depend on the caption.
        inputs: columns that the training step reads, without the caption if it is listed.
        told_stages: cached stages with an output for each caption of a sample.
        told_inputs: columns with a text for each caption of a sample.
    """

    stages: list[str]
    inputs: list[str]
    told_stages: list[str]
    told_inputs: list[str]

    @property
    def listed(self) -> list[str]:
        """The columns of the manifest that hold a list of one text for each caption."""
        stages, inputs = self.told_stages, self.told_inputs
        return [*(f"key:{s}" for s in stages), *(f"input:{i}" for i in inputs)]

    @property
    def has_captions(self) -> bool:
        """Whether samples may have several captions."""
        return bool(self.told_stages or self.told_inputs)


def columns_of(manifest: Manifest) -> Columns:
    """The stages and columns that the records of a manifest describe."""
    names, listed = manifest.rows.collect_schema().names(), set(manifest.listed)

    def with_prefix(prefix: str, told: bool) -> list[str]:
        chosen = [n for n in names if n.startswith(prefix) and (n in listed) == told]
        return [n.removeprefix(prefix) for n in chosen]

    prefixes = ("key:", "input:")
    return Columns(*(with_prefix(prefix, told) for told in (False, True) for prefix in prefixes))


def write_records(
    manifest: Manifest,
    columns: Columns,
    places: Mapping[str, NDArray[np.uint32]],
    buckets: pl.DataFrame,
    records: Path,
    captions: Path | None,
    texts: Path,
) -> None:
    """Write the records of a manifest in one pass over its rows, in batches.

    Args:
        places: stage → number of the shard of each row, or of each caption of each row.
        buckets: see `buckets_of`.
        records: file of the samples' records, one bucket after another.
        captions: file of the captions' records; None if no sample has several captions.
        texts: file of the texts, to which the records point.
    """
    kind = record_type(len(columns.stages), len(columns.inputs), columns.has_captions)
    # Where the next record of each bucket goes. Sizes are known, so all can grow at once.
    ends = np.cumsum([0, *buckets["len"]])[:-1]
    rows_done = captions_done = 0
    with ExitStack() as files:
        file, text_file = (files.enter_context(path.open("wb")) for path in (records, texts))
        caption_file = None if captions is None else files.enter_context(captions.open("wb"))
        for batch in manifest.rows.collect_batches(maintain_order=True):
            filled: Any = np.zeros(batch.height, dtype=kind)
            filled["sample"] = _fixed(batch["sample"], _SAMPLE_DIGITS)
            filled["row"] = batch["row"].to_numpy()
            filled["tokens"] = batch["tokens"].to_numpy()
            shards = {stage: places[stage][rows_done:] for stage in columns.stages}
            text_file.write(_fill_places(filled, batch, shards, columns.inputs, text_file.tell()))
            if caption_file is not None:
                # Captions stay in the order of the rows; a sample points to its first one.
                counts = batch[columns.listed[0]].list.len().to_numpy().astype(np.int64)
                filled["captions"] = counts
                filled["captions_at"] = captions_done + np.cumsum(counts) - counts
                exploded = batch.select(columns.listed).explode(columns.listed)
                told: Any = np.zeros(
                    exploded.height, place_type(len(columns.told_stages), len(columns.told_inputs))
                )
                shards = {stage: places[stage][captions_done:] for stage in columns.told_stages}
                at = text_file.tell()
                text_file.write(_fill_places(told, exploded, shards, columns.told_inputs, at))
                caption_file.write(told.tobytes())
                captions_done += exploded.height
            shape = bucket_columns(manifest.rows)
            numbered = batch.join(buckets, on=shape, how="left", maintain_order="left")
            bucket = numbered["bucket"].to_numpy()
            # The samples that this batch adds to a bucket are written behind its last ones.
            for number in np.unique(bucket):
                added = filled[bucket == number]
                file.seek(int(ends[number]) * kind.itemsize)
                file.write(added.tobytes())
                ends[number] += len(added)
            rows_done += batch.height


def place_type(stages: int, inputs: int) -> np.dtype[Any]:
    """The record of a caption: key and shard of each stage, and place of each input's text."""
    return np.dtype(
        [
            ("key", f"S{KEY_DIGITS}", (stages,)),
            ("shard", "<u4", (stages,)),
            ("at", "<u8", (inputs,)),
            ("length", "<u4", (inputs,)),
        ]
    )


def record_type(stages: int, inputs: int, has_captions: bool) -> np.dtype[Any]:
    """The record of a sample: its identity, row, tokens and captions, and then as `place_type`."""
    # Byte order is fixed: a shared run folder may be read on another machine.
    captions = [("captions_at", "<u8"), ("captions", "<u4")] if has_captions else []
    sample = [("sample", f"S{_SAMPLE_DIGITS}"), ("row", "<u4"), ("tokens", "<u4"), *captions]
    return np.dtype(sample + place_type(stages, inputs).descr)


def _fill_places(
    records: Any,
    rows: pl.DataFrame,
    shards: Mapping[str, NDArray[np.uint32]],
    inputs: Sequence[str],
    at: int,
) -> bytes:
    """Fill in the fields of `place_type` from rows of the manifest, or of its captions.

    Args:
        shards: stage → number of the shard of each row; there may be more numbers than rows.
        at: the offset in the file of texts at which the returned bytes will be written.

    Returns:
        The texts, one after another.
    """
    for number, (stage, numbers) in enumerate(shards.items()):
        records["key"][:, number] = _fixed(rows[f"key:{stage}"], KEY_DIGITS)
        records["shard"][:, number] = numbers[: rows.height]
    parts: list[bytes] = []
    for number, column in enumerate(inputs):
        texts = rows[f"input:{column}"]
        lengths = texts.str.len_bytes().to_numpy().astype(np.int64)
        records["length"][:, number] = lengths
        records["at"][:, number] = at + np.cumsum(lengths) - lengths
        parts.append(texts.str.join("").item().encode("utf-8"))
        at += len(parts[-1])
    return b"".join(parts)


def _fixed(texts: pl.Series, size: int) -> Any:
    """ASCII texts of at most `size` characters as a numpy array of type `S<size>`."""
    # One string for all, since numpy would make a Python object of each text. It strips zeros.
    padded = texts.str.pad_end(size, "\0").str.join("").item().encode("ascii")
    return np.frombuffer(padded, dtype=f"S{size}")


def bucket_columns(rows: pl.LazyFrame) -> list[str]:
    """The columns in which the samples of a bucket are equal: their shape and their repeats."""
    repeat = [REPEAT] if REPEAT in rows.collect_schema().names() else []
    return [*_SHAPE, *repeat]


def buckets_of(rows: pl.LazyFrame) -> pl.DataFrame:
    """The buckets of samples, sorted by shape.

    Args:
        rows: rows of a manifest, or accepted rows of a checked table.

    Returns:
        For each bucket its `bucket_columns`, number of samples (`len`) and number (`bucket`).
    """
    shape = bucket_columns(rows)
    counted = rows.group_by(shape).len().collect(engine="streaming").sort(shape)
    return counted.with_row_index("bucket")
