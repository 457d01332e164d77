"""Finds hard samples: those with wrong captions or pictures are among them.

The loss of a visit depends far more on its timestep than on its sample. So it is divided by the
mean loss of all samples near that timestep at that time of the training, and the ratio is averaged
over the visits of a sample: 1 is usual, and 1.2 means a loss that is 20 % above that of other
samples.
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
"""Number of equal ranges of the schedule, each with a mean of its own."""
_REMEMBERED = 200
"""Visits that a mean goes back to, roughly, so that it follows the training."""
_AT_ONCE = 50
"""Micro-batches whose losses are fetched from the device at once: fetching waits for the device."""


class SampleLosses:
    """The losses of the visits of this process.

    Args:
        samples: what is trained on.
        timesteps: number of timesteps of the schedule.
    """

    def __init__(self, samples: Samples, timesteps: int) -> None:
        self._samples = samples
        self._timesteps = timesteps
        self._waiting: list[tuple[list[int], list[int], torch.Tensor]] = []
        self._sums = np.zeros(len(samples), dtype=np.float64)
        self._visits = np.zeros(len(samples), dtype=np.float64)
        self._means = np.zeros(_RANGES, dtype=np.float64)
        self._counts = np.zeros(_RANGES, dtype=np.float64)
        # Visits of all processes before the training went on from a state.
        self._counted_before = np.zeros(_RANGES, dtype=np.float64)

    def add(self, batch: Batch, losses: torch.Tensor, weights: torch.Tensor | None) -> None:
        """Add the detached losses (B,) of a micro-batch.

        Args:
            weights: of its rows (B,), as factors in the losses; None if rows have no weights.
        """
        # With scale 0, the batch only keeps the processes in step: another process counts it.
        if batch.scale:
            # Of a row with weight 0 this is NaN, which is not counted.
            unweighted = losses if weights is None else losses / weights
            self._waiting.append((batch.places, batch.indices, unweighted))
        if len(self._waiting) >= _AT_ONCE:
            self._count()

    def _count(self) -> None:
        """Count the losses that wait, in their order, so that the result does not depend on
        when."""
        waiting, self._waiting = self._waiting, []
        for places, indices, losses in waiting:
            for place, index, loss in zip(places, indices, losses.double().tolist(), strict=True):
                if math.isnan(loss):
                    continue
                at = index * _RANGES // self._timesteps
                # A running mean over all visits at first, and an exponential average later.
                self._counts[at] += 1
                count = self._counted_before[at] + self._counts[at]
                share = max(1 / count, 1 / _REMEMBERED)
                self._means[at] += (loss - self._means[at]) * share
                if self._means[at] > 0:  # a range whose timesteps have weight 0 tells nothing
                    self._sums[place] += loss / self._means[at]
                    self._visits[place] += 1

    def pieces(self, parallel: Parallel) -> dict[str, torch.Tensor]:
        """The counts of all processes together, for a state of the training. Collective."""
        self._count()
        # Means of processes are joined in proportion to their visits.
        weighted = self._means * self._counts
        parts = (self._sums, self._visits, weighted, self._counts)
        sums, visits, total, counts = (parallel.sum(torch.from_numpy(part)) for part in parts)
        means = torch.where(counts > 0, total / counts.clamp(min=1), total)
        if parallel.num_processes == 1:
            means = torch.from_numpy(self._means.copy())  # not rounded by the division
        return {"sums": sums, "visits": visits, "means": means, "counts": counts}

    def restore(self, pieces: Mapping[str, Any], is_main_process: bool) -> None:
        """Restore what `pieces` returned. The main process goes on with the sums of all
        processes."""
        self._means[:] = pieces["means"].numpy()
        # All processes keep the means; only one keeps the counts, or they would be added again.
        counts = self._counts if is_main_process else self._counted_before
        counts[:] = pieces["counts"].numpy()
        if is_main_process:
            self._sums[:] = pieces["sums"].numpy()
            self._visits[:] = pieces["visits"].numpy()

    def write(self, folder: Path, parallel: Parallel) -> None:
        """Write `sample_losses.parquet`: `row`, `difficulty` and `visits` of each sample that was
        visited, the hardest first. Collective.

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
