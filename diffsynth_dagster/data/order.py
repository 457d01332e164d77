"""Which samples an optimizer step sees: a function of (seed, step), with no state.

Samples of equal shape form a bucket. Every bucket is cut into blocks of one optimizer step; what
does not fill a block is cut into micro-batches, and these are packed into mixed steps. So every
sample is seen exactly once per epoch and repeat, a full step sees the same samples however it is
split into micro-batches and processes, and no incomplete batch is lost.
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from diffsynth_dagster.data.permutation import Permutation


@dataclass(frozen=True)
class Visit:
    """One look at one sample. `visit` counts how often the sample was seen before."""

    bucket: int
    index: int
    visit: int


MicroBatch = list[Visit]


class StepOrder:
    """The order of a training: optimizer step → micro-batches.

    Args:
        sizes: number of samples of each bucket.
        repeat: how often an epoch goes through them.
        batch_size: samples of a micro-batch.
        slots: micro-batches of an optimizer step over all processes.
    """

    def __init__(
        self, sizes: Sequence[int], repeat: int, batch_size: int, slots: int, seed: int
    ) -> None:
        assert all(size > 0 for size in sizes)
        assert sizes
        self._sizes = list(sizes)
        self._repeat = repeat
        self._batch = batch_size
        self._slots = slots
        self._seed = seed
        self._block = batch_size * slots
        blocks = [size * repeat // self._block for size in sizes]
        self._ends = list(accumulate(blocks))
        self._rest = [
            (bucket, start, min(batch_size, size * repeat - start))
            for bucket, size in enumerate(sizes)
            for start in range(blocks[bucket] * self._block, size * repeat, batch_size)
        ]
        self.samples_per_epoch = sum(sizes) * repeat
        self.steps_per_epoch = self._ends[-1] + -(-len(self._rest) // slots)

    @property
    def key(self) -> list[Any]:
        """What every step depends on. Equal keys give equal steps, with the samples in the same order,
        however these are split among processes."""
        rest = [self._batch, self._slots] if self._rest else []
        return [self._sizes, self._repeat, self._seed, self._block, rest]

    def step(self, step: int) -> list[MicroBatch]:
        """The micro-batches of optimizer step `step`, counted from 0 over all epochs."""
        epoch, position = divmod(step, self.steps_per_epoch)
        place = Permutation(self.steps_per_epoch, self._seed, "step", epoch)[position]
        if place < self._ends[-1]:
            bucket = bisect_right(self._ends, place)
            first = (place - (self._ends[bucket - 1] if bucket else 0)) * self._block
            cuts = [
                (bucket, first + offset, self._batch)
                for offset in range(0, self._block, self._batch)
            ]
        else:
            shuffled = Permutation(len(self._rest), self._seed, "rest", epoch)
            first = (place - self._ends[-1]) * self._slots
            last = min(first + self._slots, len(self._rest))
            cuts = [self._rest[shuffled[index]] for index in range(first, last)]
        orders = {
            b: Permutation(self._sizes[b] * self._repeat, self._seed, "sample", epoch, b)
            for b in {cut[0] for cut in cuts}
        }
        return [
            [self._visit(epoch, b, orders[b][start + offset]) for offset in range(count)]
            for b, start, count in cuts
        ]

    def _visit(self, epoch: int, bucket: int, element: int) -> Visit:
        repeat, index = divmod(element, self._sizes[bucket])
        return Visit(bucket, index, epoch * self._repeat + repeat)
