"""Which samples an optimizer step sees: a function of (seed, step), with no state.

Samples of equal shape form a bucket. An epoch goes through every bucket `repeat` times, or a
multiple of that for samples that are taken more often, each time in another order. The resulting
sequence of a bucket is cut into micro-batches. The micro-batches of all buckets are shuffled
together, and a step takes consecutive ones. So:

- a step mixes shapes, while a micro-batch has one;
- every sample is seen exactly once per epoch and repeat, and no incomplete batch is dropped;
- a step sees the same samples however its micro-batches are split among processes and accumulation.
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import Any

from diffsynth_dagster.config.parameters import TrainingConfig
from diffsynth_dagster.data.permutation import Permutation

_permutation = lru_cache(maxsize=1024)(Permutation)
"""Cached: consecutive steps use the same permutations."""


def total_steps(config: TrainingConfig, steps_per_epoch: int) -> int:
    """Optimizer steps of a whole training: `max_train_steps`, or as many as `num_epochs` take."""
    return config.max_train_steps or config.num_epochs * steps_per_epoch


def order_of(
    config: TrainingConfig, sizes: Sequence[int], processes: int, repeats: Sequence[int] = ()
) -> "StepOrder":
    """The order of the samples in a training.

    Args:
        sizes: number of samples of each bucket.
        processes: number of processes of the whole job.
        repeats: how often a pass over the data set takes each bucket; once if left out.
    """
    return StepOrder(
        sizes,
        config.dataset_repeat,
        config.batch_size,
        config.gradient_accumulation_steps * processes,
        config.seed,
        repeats,
    )


@dataclass(frozen=True)
class Visit:
    """One use of one sample. `visit` counts how often the sample was used before."""

    bucket: int
    index: int
    visit: int


MicroBatch = list[Visit]


class StepOrder:
    """The order of a training: optimizer step → micro-batches.

    Args:
        sizes: number of samples of each bucket.
        repeat: how often an epoch goes through the data set.
        batch_size: samples of a micro-batch.
        slots: micro-batches of an optimizer step, over all processes.
        repeats: a factor of `repeat` for each bucket; 1 if left out.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        repeat: int,
        batch_size: int,
        slots: int,
        seed: int,
        repeats: Sequence[int] = (),
    ) -> None:
        assert all(size > 0 for size in sizes)
        assert sizes
        self._sizes = list(sizes)
        self._repeat = repeat
        # Empty if all are 1, so that the key is the same with and without repeats that do nothing.
        self._repeats = [number for number in repeats if any(n > 1 for n in repeats)]
        turns = [repeat * number for number in repeats or [1] * len(sizes)]
        self._turns = turns
        self._batch = batch_size
        self._slots = slots
        self._seed = seed
        visits = [size * often for size, often in zip(sizes, turns, strict=True)]
        # Micro-batches are numbered through all buckets; `_ends` has the number after each bucket's
        # last one. -(-a // b) is the quotient rounded up.
        self._ends = list(accumulate(-(-number // batch_size) for number in visits))
        self.samples_per_epoch = sum(visits)
        self.steps_per_epoch = -(-self._ends[-1] // slots)

    @property
    def key(self) -> list[Any]:
        """Everything that the order depends on. Equal keys give equal steps, with the samples in
        the same order, however they are split among processes."""
        more = [self._repeats] if self._repeats else []
        return [self._sizes, self._repeat, self._seed, self._batch, self._slots, *more]

    def step(self, step: int) -> list[MicroBatch]:
        """The micro-batches of optimizer step `step`, counted from 0 over all epochs."""
        epoch, position = divmod(step, self.steps_per_epoch)
        shuffled = _permutation(self._ends[-1], self._seed, "micro-batch", epoch)
        first = position * self._slots
        last = min(first + self._slots, len(shuffled))
        return [self._micro_batch(epoch, shuffled[index]) for index in range(first, last)]

    def _micro_batch(self, epoch: int, number: int) -> MicroBatch:
        """The micro-batch with this number (through all buckets) of an epoch."""
        bucket = bisect_right(self._ends, number)
        size = self._sizes[bucket]
        # Places in the bucket's sequence of the epoch: `size * turns` samples, turn after turn.
        first = (number - (self._ends[bucket - 1] if bucket else 0)) * self._batch
        last = min(first + self._batch, size * self._turns[bucket])
        # A micro-batch may reach over the end of a turn; each turn has an order of its own.
        orders = {
            turn: _permutation(size, self._seed, "sample", epoch, bucket, turn)
            for turn in range(first // size, (last - 1) // size + 1)
        }
        visits = (divmod(element, size) for element in range(first, last))
        return [
            Visit(bucket, orders[turn][place], epoch * self._turns[bucket] + turn)
            for turn, place in visits
        ]
