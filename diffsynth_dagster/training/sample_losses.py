"""Which samples are hard: those whose captions or pictures are wrong are among them.

The loss of a visit depends on its timestep far more than on its sample. So it is divided by the mean
loss of all samples near that timestep at that time of the training, and the quotient is averaged over
the visits of a sample: 1 is usual, and 1.2 is a fifth more than other samples.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch

from diffsynth_dagster.cache.resolve import Samples
from diffsynth_dagster.files import write_whole
from diffsynth_dagster.run.record import SAMPLE_LOSSES
from diffsynth_dagster.training.batches import Batch
from diffsynth_dagster.training.parallel import Parallel

_RANGES = 20
"""Equal ranges of the schedule that have a mean of their own."""
_REMEMBERED = 200
"""Visits that such a mean goes back to, about: it follows the training."""
_AT_ONCE = 50
"""Micro-batches whose losses are fetched from the device together."""


class SampleLosses:
    """The losses of the visits of this process.

    Args:
        timesteps: of the schedule.
    """

    def __init__(self, samples: Samples, timesteps: int) -> None:
        self._samples = samples
        self._timesteps = timesteps
        self._waiting: list[tuple[list[int], list[int], torch.Tensor]] = []
        self._sums = np.zeros(len(samples), dtype=np.float64)
        self._visits = np.zeros(len(samples), dtype=np.float64)
        self._means = np.zeros(_RANGES, dtype=np.float64)
        self._counts = np.zeros(_RANGES, dtype=np.float64)
        self._counted_before = np.zeros(_RANGES, dtype=np.float64)

    def add(self, batch: Batch, losses: torch.Tensor, weights: torch.Tensor | None) -> None:
        """Take in the losses (B,) of a micro-batch, without a graph.

        Args:
            weights: (B,) of its rows, which the losses were multiplied by; None where they have none.
        """
        if batch.scale:  # else it is another's
            own = losses if weights is None else losses / weights  # NaN: no weight
            self._waiting.append((batch.places, batch.indices, own))
        if len(self._waiting) >= _AT_ONCE:
            self._count()

    def _count(self) -> None:
        """Count what waits, in its order, so that it does not matter when it is counted."""
        waiting, self._waiting = self._waiting, []
        for places, indices, losses in waiting:
            for place, index, loss in zip(places, indices, losses.double().tolist(), strict=True):
                if math.isnan(loss):
                    continue
                at = index * _RANGES // self._timesteps
                self._counts[at] += 1
                count = self._counted_before[at] + self._counts[at]
                share = max(1 / count, 1 / _REMEMBERED)
                self._means[at] += (loss - self._means[at]) * share
                if self._means[at] > 0:  # where no timestep of a range counts, nothing is hard
                    self._sums[place] += loss / self._means[at]
                    self._visits[place] += 1

    def pieces(self, parallel: Parallel) -> dict[str, torch.Tensor]:
        """What all processes counted together, for a state of the training. Collective."""
        self._count()
        weighted = self._means * self._counts
        parts = (self._sums, self._visits, weighted, self._counts)
        sums, visits, total, counts = (parallel.sum(torch.from_numpy(part)) for part in parts)
        means = torch.where(counts > 0, total / counts.clamp(min=1), total)
        if parallel.num_processes == 1:
            means = torch.from_numpy(self._means.copy())  # the same bits
        return {"sums": sums, "visits": visits, "means": means, "counts": counts}

    def restore(self, pieces: Mapping[str, Any], is_main_process: bool) -> None:
        """Give back what `pieces` gave: the main process goes on with it."""
        self._means[:] = pieces["means"].numpy()
        counts = self._counts if is_main_process else self._counted_before
        counts[:] = pieces["counts"].numpy()
        if is_main_process:
            self._sums[:] = pieces["sums"].numpy()
            self._visits[:] = pieces["visits"].numpy()

    def write(self, folder: Path, parallel: Parallel) -> None:
        """Write the samples that were visited into `sample_losses.parquet`, the hardest first: `row`,
        `difficulty` and `visits`. Collective.

        Raises:
            OutputError: the run folder cannot be written.
        """
        pieces = self.pieces(parallel)
        if parallel.is_main_process:
            columns = {
                "row": self._samples.rows(),
                "difficulty": (pieces["sums"] / pieces["visits"].clamp(min=1)).numpy(),
                "visits": pieces["visits"].numpy().astype(np.uint32),
            }
            frame = pl.DataFrame(columns).filter(pl.col("visits") > 0)
            frame = frame.sort(["difficulty", "row"], descending=[True, False])
            write_whole(folder / SAMPLE_LOSSES, frame.write_parquet)
        parallel.wait_for_everyone()
