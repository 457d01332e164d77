"""Collects the losses of each row over its visits, and writes them as `rows.parquet`.

The loss of a visit depends far more on its timestep than on its sample. So it is divided by the
mean loss of all samples near that timestep at that time of the training: 1 is usual, and 1.2 means
a loss that is 20 % above that of other samples. What the visits of a row say together is in
`difficulty.py`.
"""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch

from diffsynth_dagster.cache.resolve import Samples
from diffsynth_dagster.files import write_whole
from diffsynth_dagster.run.record import ROWS
from diffsynth_dagster.training.batches import Batch
from diffsynth_dagster.training.difficulty import difficulties, noise_weight
from diffsynth_dagster.training.parallel import Parallel

_RANGES = 20
"""Number of equal ranges of the schedule. A mean is kept at each of their bounds, and between two
bounds the usual loss is interpolated: at the ends of the schedule it changes much within a range."""
_REMEMBERED = 500
"""Visits near it that a mean goes back to, roughly, so that it follows the training."""
_AT_ONCE = 50
"""Micro-batches whose losses are fetched from the device at once: fetching waits for the device."""
_NAMED = 10
"""How many rows that stand out are named in the warning."""


class RowLosses:
    """The losses of the visits of this process: a few numbers for each row.

    Args:
        samples: what is trained on.
        timesteps: number of timesteps of the schedule; None if the loss of a visit does not depend
            on its timestep (distillation).
    """

    def __init__(self, samples: Samples, timesteps: int | None) -> None:
        self._samples = samples
        self._timesteps = timesteps
        self._waiting: list[tuple[list[int], list[int], torch.Tensor]] = []
        # At much noise, and at little noise: see `difficulty.py`.
        self._sums = np.zeros((2, len(samples)), dtype=np.float32)
        self._weights = np.zeros((2, len(samples)), dtype=np.float32)
        self._visits = np.zeros(len(samples), dtype=np.float64)
        self._means = np.zeros(_RANGES + 1, dtype=np.float64)
        self._counts = np.zeros(_RANGES + 1, dtype=np.float64)
        # Visits of all processes before the training went on from a state.
        self._counted_before = np.zeros(_RANGES + 1, dtype=np.float64)

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
                if not math.isnan(loss):
                    self._count_visit(place, index, loss)

    def _count_visit(self, place: int, index: int, loss: float) -> None:
        """Count a visit of a sample at an index of the schedule."""
        in_schedule = 0.0 if self._timesteps is None else (index + 0.5) / self._timesteps
        below = int(in_schedule * _RANGES)
        share = in_schedule * _RANGES - below
        usual = (1.0 - share) * self._mean_with(below, loss, 1.0 - share)
        if share > 0.0:
            usual += share * self._mean_with(below + 1, loss, share)
        if usual <= 0.0:  # where the timesteps have weight 0
            return
        excess = loss / usual - 1.0
        kind, weight = noise_weight(in_schedule)
        self._sums[kind, place] += weight * excess
        self._weights[kind, place] += weight
        self._visits[place] += 1

    def _mean_with(self, bound: int, loss: float, weight: float) -> float:
        """The mean at a bound of the ranges, to which a loss was added."""
        # A running mean over all visits at first, and an exponential average later.
        self._counts[bound] += weight
        count = self._counted_before[bound] + self._counts[bound]
        self._means[bound] += (loss - self._means[bound]) * weight * max(1 / count, 1 / _REMEMBERED)
        return float(self._means[bound])

    def pieces(self, parallel: Parallel) -> dict[str, torch.Tensor]:
        """The counts of all processes together, for a state of the training. Collective."""
        self._count()
        rows = {"sums": self._sums, "weights": self._weights, "visits": self._visits}
        pieces = {name: parallel.sum(torch.from_numpy(part)) for name, part in rows.items()}
        # Means of processes are joined in proportion to their visits.
        total = parallel.sum(torch.from_numpy(self._means * self._counts))
        counts = parallel.sum(torch.from_numpy(self._counts))
        means = torch.where(counts > 0, total / counts.clamp(min=1), total)
        if parallel.num_processes == 1:
            means = torch.from_numpy(self._means.copy())  # not rounded by the division
        return {**pieces, "means": means, "counts": counts}

    def restore(self, pieces: Mapping[str, Any], is_main_process: bool) -> None:
        """Restore what `pieces` returned. The main process goes on with the sums of all
        processes."""
        if "weights" not in pieces:
            return  # an older state, which counted in another way: counted from here on
        self._means[:] = pieces["means"].numpy()
        # All processes keep the means; only one keeps the counts, or they would be added again.
        counts = self._counts if is_main_process else self._counted_before
        counts[:] = pieces["counts"].numpy()
        if is_main_process:
            self._sums[:] = pieces["sums"].numpy()
            self._weights[:] = pieces["weights"].numpy()
            self._visits[:] = pieces["visits"].numpy()

    def write(self, folder: Path, parallel: Parallel, warn: Callable[[str], None]) -> None:
        """Write `rows.parquet`, a row for each sample that was visited, the hardest first, and warn
        of those that stand out. Collective.

        Its columns are `row`, counted from 1 in the table of the data set; `visits`; and those that
        `Difficulties` describes: `difficulty`, `much_noise`, `little_noise`, `deviation`,
        `stands_out`.

        Raises:
            OutputError: the run folder cannot be written.
        """
        pieces = self.pieces(parallel)
        if parallel.is_main_process:
            frame = self._table({name: piece.numpy() for name, piece in pieces.items()})
            write_whole(folder / ROWS, frame.write_parquet)
            named = frame.filter("stands_out")["row"].to_list()
            if named:
                warn(_warning(named))
        parallel.wait_for_everyone()

    def _table(self, pieces: Mapping[str, Any]) -> pl.DataFrame:
        seen = pieces["visits"] > 0
        visits = pieces["visits"][seen]
        found = difficulties(pieces["sums"][:, seen], pieces["weights"][:, seen], visits)
        columns = {
            "row": self._samples.rows()[seen],
            "difficulty": found.difficulty,
            "visits": visits.astype(np.uint32),
            "much_noise": found.much_noise,
            "little_noise": found.little_noise,
            "deviation": found.deviation,
            "stands_out": found.stands_out,
        }
        return pl.DataFrame(columns).sort(["difficulty", "row"], descending=[True, False])


def _warning(rows: list[int]) -> str:
    """What is said of rows that stand out, the hardest first."""
    first = ", ".join(str(row) for row in rows[:_NAMED])
    more = f" and {len(rows) - _NAMED} more" if len(rows) > _NAMED else ""
    which = f"row {first} stays" if len(rows) == 1 else f"rows {first}{more} stay"
    return (
        f"{which} far harder to learn than others like {'it' if len(rows) == 1 else 'them'}: look "
        f"whether picture and caption belong together; {ROWS} has all rows, the hardest first"
    )
