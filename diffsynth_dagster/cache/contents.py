"""Check a manifest against the store: whether every sample is stored, and every tensor finite."""

from dataclasses import dataclass
from pathlib import Path

import polars as pl

from diffsynth_dagster.cache.manifest import Manifest
from diffsynth_dagster.cache.store import Store
from diffsynth_dagster.data.table.validate import CheckedTable


@dataclass(frozen=True)
class Contents:
    """What a store holds for a manifest.

    Attributes:
        samples: number of rows of the manifest.
        accepted: number of accepted rows of the checked table.
        missing: number of keys that the store lacks.
        not_finite: number of keys whose tensors hold NaN or infinity.
        bytes: size of the tensors.
        buckets: (width, height, number of samples) of each size.
    """

    samples: int
    accepted: int
    missing: int
    not_finite: int
    bytes: int
    buckets: list[tuple[int, int, int]]

    @property
    def sound(self) -> bool:
        """Whether every accepted row is completely stored and finite."""
        return not self.missing and not self.not_finite and self.samples == self.accepted


def look_into(manifest: Manifest, table: CheckedTable) -> Contents:
    """Compare a manifest with the table it was made from, and with the store's index."""
    store = Store(Path(manifest.store))
    # Two writers may have stored the same key: its tensors are counted once.
    held = store.scan().join(manifest.keys, on="key", how="semi").unique(["key", "output"])
    broken = held.filter(~pl.col("finite")).select(pl.col("key").n_unique())
    sizes = manifest.rows.group_by("width", "height").len().sort("width", "height").collect()
    return Contents(
        samples=int(sizes["len"].sum()),
        accepted=table.counts.get("ok", 0),
        missing=len(store.missing(manifest.keys)),
        not_finite=int(store.collect(broken).item()),
        bytes=int(store.collect(held.select(pl.col("bytes").sum())).item()),
        buckets=[(width, height, count) for width, height, count in sizes.iter_rows()],
    )
