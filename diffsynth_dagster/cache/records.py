"""Files of fixed-size records: where each sample of a manifest lies; see `cache.resolve`."""

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
"""Of `<identity>-<n>`, with n below 2 to the 32."""


@dataclass(frozen=True)
class Columns:
    """What the records hold.

    Attributes:
        stages, inputs: the cached stages, and the columns that the step reads.
        told_stages, told_inputs: those that differ between the captions of a sample.
    """

    stages: list[str]
    inputs: list[str]
    told_stages: list[str]
    told_inputs: list[str]

    @property
    def listed(self) -> list[str]:
        """The columns of the manifest that have a text for each caption."""
        stages, inputs = self.told_stages, self.told_inputs
        return [*(f"key:{s}" for s in stages), *(f"input:{i}" for i in inputs)]

    @property
    def has_captions(self) -> bool:
        """Whether samples may have several captions."""
        return bool(self.told_stages or self.told_inputs)


def columns_of(manifest: Manifest) -> Columns:
    """What the records of a manifest hold."""
    names, listed = manifest.rows.collect_schema().names(), set(manifest.listed)

    def of(start: str, told: bool) -> list[str]:
        chosen = [n for n in names if n.startswith(start) and (n in listed) == told]
        return [n.removeprefix(start) for n in chosen]

    return Columns(*(of(start, told) for told in (False, True) for start in ("key:", "input:")))


def write_records(
    manifest: Manifest,
    columns: Columns,
    places: Mapping[str, NDArray[np.uint32]],
    buckets: pl.DataFrame,
    records: Path,
    captions: Path | None,
    texts: Path,
) -> None:
    """Write the records of a manifest bucket after bucket, and those of its captions, if samples may
    have several, and their texts in any order.

    The manifest is read once, in batches: what a batch adds to a bucket is written behind what the
    bucket has already.
    """
    kind = record_type(len(columns.stages), len(columns.inputs), columns.has_captions)
    ends = np.cumsum([0, *buckets["len"]])[:-1]
    done = told = 0
    with ExitStack() as files:
        file, text_file = (files.enter_context(path.open("wb")) for path in (records, texts))
        told_file = None if captions is None else files.enter_context(captions.open("wb"))
        for batch in manifest.rows.collect_batches(maintain_order=True):
            made: Any = np.zeros(batch.height, dtype=kind)
            made["sample"] = _fixed(batch["sample"], _SAMPLE_DIGITS)
            made["row"] = batch["row"].to_numpy()
            made["tokens"] = batch["tokens"].to_numpy()
            own = {stage: places[stage][done:] for stage in columns.stages}
            text_file.write(_fill_places(made, batch, own, columns.inputs, text_file.tell()))
            if told_file is not None:
                counts = batch[columns.listed[0]].list.len().to_numpy().astype(np.int64)
                made["captions"] = counts
                made["captions_at"] = told + np.cumsum(counts) - counts
                each = batch.select(columns.listed).explode(columns.listed)
                more: Any = np.zeros(
                    each.height, place_type(len(columns.told_stages), len(columns.told_inputs))
                )
                own = {stage: places[stage][told:] for stage in columns.told_stages}
                at = text_file.tell()
                text_file.write(_fill_places(more, each, own, columns.told_inputs, at))
                told_file.write(more.tobytes())
                told += each.height
            shape = bucket_columns(manifest.rows)
            numbered = batch.join(buckets, on=shape, how="left", maintain_order="left")
            bucket = numbered["bucket"].to_numpy()
            for number in np.unique(bucket):
                added = made[bucket == number]
                file.seek(int(ends[number]) * kind.itemsize)
                file.write(added.tobytes())
                ends[number] += len(added)
            done += batch.height


def place_type(stages: int, inputs: int) -> np.dtype[Any]:
    """The record of a caption: key and shard of each stage, and where the text of each input lies."""
    return np.dtype(
        [
            ("key", f"S{KEY_DIGITS}", (stages,)),
            ("shard", "<u4", (stages,)),
            ("at", "<u8", (inputs,)),
            ("length", "<u4", (inputs,)),
        ]
    )


def record_type(stages: int, inputs: int, has_captions: bool) -> np.dtype[Any]:
    """The record of a sample."""
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
    """Fill the places of records in from rows of the manifest, or of its captions.

    Args:
        shards: stage → number of the shard of each row, and of those behind them.
        at: where the texts begin in their file.

    Returns:
        The texts.
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
    """ASCII texts of at most `size` characters as an array of bytes of that size."""
    padded = texts.str.pad_end(size, "\0").str.join("").item().encode("ascii")
    return np.frombuffer(padded, dtype=f"S{size}")


def bucket_columns(rows: pl.LazyFrame) -> list[str]:
    """The columns in which samples of a bucket are equal: their shape, and how often they are taken."""
    more = [REPEAT] if REPEAT in rows.collect_schema().names() else []
    return [*_SHAPE, *more]


def buckets_of(rows: pl.LazyFrame) -> pl.DataFrame:
    """The buckets of the samples in order of size: `bucket_columns`, `len` and number (`bucket`) of
    each.

    Args:
        rows: of a manifest, or accepted ones of a checked table.
    """
    shape = bucket_columns(rows)
    counted = rows.group_by(shape).len().collect(engine="streaming").sort(shape)
    return counted.with_row_index("bucket")
