"""Find rows whose picture or clip is a near copy of another one: compressed again, resized, cropped
by a little, or of another brightness.

Rows are compared by their signatures (see `data.media.signature`). Only those are compared that fall
into the same bucket in one of `_BANDS` hash tables, so the time grows with the number of rows, not
with its square. A bucket is 16 bits, each the side of a random plane on which a signature lies
(Charikar 2002, "Similarity estimation techniques from rounding algorithms").
"""

from collections.abc import Iterator

import numpy as np
import polars as pl
from numpy.typing import NDArray

from diffsynth_dagster.cache.manifest import SIGNATURE
from diffsynth_dagster.data.media.signature import FLAT, VALUES, vectors_of

Vectors = NDArray[np.float32]
"""Signatures as vectors (N, VALUES) of length 1."""
NEAR = 0.99
"""Scalar product of two signatures from which on they are near copies. Measured on photographs and
on the demo's digits: a picture that is compressed as JPEG of quality 70, halved or doubled, or 5 %
brighter reaches 0.995, and 0.98 to 0.999 if 1 % is cropped from each side. Of all 1.6 million pairs
of digits, which are as alike as pictures get, 3 reach it."""
_BANDS, _BITS = 8, 16
"""Hash tables, and the bits of a bucket. At `NEAR` two signatures share a bucket of at least one
table with a probability of 0.995; the nearer, the surer."""
_MOST_IN_BUCKET = 64
"""No more signatures of a bucket are compared: most are alike in a data set with huge buckets."""
_AT_ONCE, _COMPARED = 1 << 16, 1 << 11
"""Rows that are read, and that are compared, at once."""


class _Index:
    """Hash tables of signatures."""

    def __init__(self, vectors: Vectors) -> None:
        self._vectors = vectors
        # Always the same planes: what is found follows from the two signatures.
        shape = (VALUES, _BANDS * _BITS)
        self._planes = np.random.default_rng(0).standard_normal(shape, dtype=np.float32)
        buckets = self._buckets(vectors)
        orders = np.argsort(buckets, axis=0, kind="stable")
        self._tables = [(buckets[orders[:, b], b], orders[:, b]) for b in range(_BANDS)]

    def find(self, vectors: Vectors) -> NDArray[np.intp]:
        """For each vector the position of one in the index that is near, else -1: (N,)."""
        parts = range(0, len(vectors), _COMPARED)
        found = [self._find(vectors[at : at + _COMPARED]) for at in parts]
        return np.concatenate(found) if found else np.zeros(0, dtype=np.intp)

    def _buckets(self, vectors: Vectors) -> NDArray[np.uint16]:
        """The bucket of each vector in each table: (N, _BANDS)."""
        return np.packbits(vectors @ self._planes > 0, axis=1).view(np.uint16)

    def _find(self, vectors: Vectors) -> NDArray[np.intp]:
        found = np.full(len(vectors), -1, dtype=np.intp)
        buckets = self._buckets(vectors)
        for band, (sorted_buckets, order) in enumerate(self._tables):
            left = np.flatnonzero(found < 0)
            first = np.searchsorted(sorted_buckets, buckets[left, band], "left")
            last = np.searchsorted(sorted_buckets, buckets[left, band], "right")
            count = np.minimum(last - first, _MOST_IN_BUCKET)
            # All pairs of a vector and a member of its bucket, the pairs of one vector in a row.
            number = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count)
            one, other = np.repeat(left, count), order[np.repeat(first, count) + number]
            near = np.einsum("ij,ij->i", vectors[one], self._vectors[other]) >= NEAR
            found[one[near]] = other[near]
        return found


def near_trained(rows: pl.LazyFrame, held_out: pl.LazyFrame) -> pl.DataFrame:
    """The trained rows that are near copies of held-out rows.

    Args:
        rows, held_out: the rows of both, with `row` and `SIGNATURE`.

    Returns:
        `row`, the number of a trained row, and `of`, that of a held-out row, sorted by `row`.
    """
    kept = pl.concat([*_batches(held_out)])
    index = _Index(_vectors(kept))
    found = [_pairs(batch, index.find(_vectors(batch)), kept) for batch in _batches(rows)]
    return pl.concat(found).sort("row")


def near_held_out(rows: pl.LazyFrame, held_out: pl.LazyFrame) -> pl.DataFrame:
    """The held-out rows that are near copies of trained rows.

    Args:
        rows, held_out: the rows of both, with `row` and `SIGNATURE`.

    Returns:
        `row`, the number of a held-out row, and `of`, that of a trained row, sorted by `row`.
    """
    left = pl.concat([*_batches(held_out)])
    found = [_pairs(left.clear(), np.zeros(0, dtype=np.intp), left)]
    for batch in _batches(rows):
        at = _Index(_vectors(batch)).find(_vectors(left))
        found.append(_pairs(left, at, batch))
        left = left.filter(pl.Series(at < 0))
    return pl.concat(found).sort("row")


def unsigned(rows: pl.LazyFrame) -> int:
    """How many rows were checked by a version that made no signatures."""
    if SIGNATURE not in rows.collect_schema().names():
        return int(rows.select(pl.len()).collect(engine="streaming").item())
    return int(rows.select(pl.col(SIGNATURE).null_count()).collect(engine="streaming").item())


def _batches(rows: pl.LazyFrame) -> Iterator[pl.DataFrame]:
    """`row` and `SIGNATURE` of the rows that have one, some at a time; at least one batch."""
    if SIGNATURE not in rows.collect_schema().names():
        rows = rows.with_columns(pl.lit(None, pl.String).alias(SIGNATURE))
    wanted = rows.select("row", SIGNATURE)
    yield wanted.clear().collect()
    signed = wanted.filter(pl.col(SIGNATURE) != FLAT)
    for batch in signed.collect_batches(maintain_order=True, chunk_size=_AT_ONCE):
        yield from batch.iter_slices(_AT_ONCE)


def _vectors(rows: pl.DataFrame) -> Vectors:
    return vectors_of(rows[SIGNATURE].to_list())


def _pairs(rows: pl.DataFrame, found: NDArray[np.intp], of: pl.DataFrame) -> pl.DataFrame:
    """`row` and `of` of the rows for which one was found."""
    at = np.flatnonzero(found >= 0)
    return pl.DataFrame({"row": rows["row"][at], "of": of["row"][found[at]]})
