"""Reads the micro-batches of an optimizer step, as the manifest lists them, from the store."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from diffsynth_dagster.cache.resolve import Sample, Samples
from diffsynth_dagster.cache.store import Store
from diffsynth_dagster.config.parameters import TrainingConfig
from diffsynth_dagster.data.order import MicroBatch, Visit, order_of
from diffsynth_dagster.data.samples import load_files, parse_value
from diffsynth_dagster.errors import UserError
from diffsynth_dagster.families.contract import Output, Tensors
from diffsynth_dagster.families.denoiser_schedule import share_of_step
from diffsynth_dagster.objective.captions import caption_index
from diffsynth_dagster.objective.devices import to_device
from diffsynth_dagster.weights.resolved import ResolvedModel


@dataclass(frozen=True)
class Batch:
    """A micro-batch.

    Attributes:
        samples, visits: name of each sample, and how often it was seen before.
        places: position of each sample in `Samples`.
        indices: timestep of each sample, as an index into the schedule. Distillation ignores it.
        seed: of the noise.
        outputs: stacked outputs of the cached stages (B, …); ragged ones are padded and have masks.
        inputs: column → value of each sample, for the stages that run in the step.
        denoiser: the component that predicts, the same for all micro-batches of a step.
        scale: factor on the sum of the samples' losses. With it, the gradients of an optimizer step
            add up to the gradient of the mean over its samples. A batch with scale 0 only keeps the
            processes in step.
    """

    samples: list[str]
    visits: list[int]
    places: list[int]
    indices: list[int]
    seed: int
    outputs: Tensors
    inputs: list[dict[str, Any]]
    denoiser: str
    scale: float

    def to(self, device: torch.device) -> "Batch":
        """The batch with its tensors on a device."""
        move = {name: to_device(tensor, device) for name, tensor in self.outputs.items()}
        return replace(self, outputs=move)


def collate(outputs: Sequence[Output], samples: Sequence[Tensors]) -> Tensors:
    """Stack the outputs of samples. Ragged ones are padded with zeros and get a mask (B, L)."""
    stacked: Tensors = {}
    for output in outputs:
        if output.optional and output.name not in samples[0]:
            continue  # the others lack it too: a batch has one shape
        tensors = [sample[output.name] for sample in samples]
        if not output.ragged:
            stacked[output.name] = torch.stack(tensors)
            continue
        lengths = torch.tensor([len(t) for t in tensors], device=tensors[0].device)
        stacked[output.name] = torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True)
        positions = torch.arange(int(lengths.max()), device=lengths.device)
        stacked[f"{output.name}_mask"] = positions < lengths[:, None]
    return stacked


class StepDataset(Dataset[list[Batch]]):
    """Optimizer step, counted from 0 → the micro-batches of one process.

    Every process gets the same number of micro-batches; its last one may have scale 0.

    Args:
        rank: of this process.
        world: number of processes.
    """

    def __init__(
        self,
        config: TrainingConfig,
        model: ResolvedModel,
        samples: Samples,
        rank: int,
        world: int,
    ) -> None:
        self._schedule = model.schedule
        self._seed = config.seed
        self._caption_dropout = config.caption_dropout_rate
        self._cached = model.cached_stages
        self._step_inputs = list(dict.fromkeys(i for s in model.step_stages for i in s.reads))
        self._samples = samples
        self._store = Store(samples.store)
        self._rank = rank
        self._world = world
        self.order = order_of(config, samples.buckets, world, samples.repeats)
        self._step: tuple[int, list[MicroBatch]] | None = None

    def counts(self, step: int) -> tuple[int, int]:
        """How many samples an optimizer step has on all processes, and the patches of their
        latents.

        Args:
            step: counted from 0.
        """
        visits = [visit for micro in self._micros(step) for visit in micro]
        return len(visits), sum(self._samples.tokens_at(v.bucket, v.index) for v in visits)

    def __getitem__(self, step: int) -> list[Batch]:
        """The micro-batches of this process for an optimizer step.

        Raises:
            StoreError: a shard is damaged.
            MetadataError: a file that the step reads has changed since it was checked.
        """
        micros = self._micros(step)
        # The processes average their gradients, so this makes them those of the mean over samples.
        scale = self._world / sum(len(micro) for micro in micros)
        # All micro-batches of a step go to one denoiser, so that it gets a whole step's gradient.
        share = share_of_step(self._schedule.shares, self._seed, step)
        mine = micros[self._rank :: self._world]
        scales = [scale] * len(mine)
        # Every process must take part in the reduction of gradients equally often. One that has a
        # micro-batch less computes the step's first one with scale 0, which adds nothing.
        if len(mine) < -(-len(micros) // self._world):
            mine, scales = [*mine, micros[0]], [*scales, 0.0]
        denoiser = share.component
        return [self._batch(m, denoiser, scale) for m, scale in zip(mine, scales, strict=True)]

    def _micros(self, step: int) -> list[MicroBatch]:
        """The micro-batches of a step on all processes. The newest result is kept."""
        if self._step is None or self._step[0] != step:
            self._step = step, self.order.step(step)
        return self._step[1]

    def _batch(self, micro: MicroBatch, denoiser: str, scale: float) -> Batch:
        """Read a micro-batch, with the timesteps that are drawn for its visits."""
        share = next(s for s in self._schedule.shares if s.component == denoiser)
        samples = [self._sample(visit) for visit in micro]
        visits = [visit.visit for visit in micro]
        # All samples of a micro-batch have one shape.
        pixels = self._samples.pixels(micro[0].bucket)
        indices = [
            self._schedule.index(share, sample.sample, visit, pixels)
            for sample, visit in zip(samples, visits, strict=True)
        ]
        return self.read(samples, visits, indices, self._seed, denoiser, scale)

    def read(
        self,
        samples: Sequence[Sample],
        visits: list[int],
        indices: list[int],
        seed: int,
        denoiser: str,
        scale: float,
    ) -> Batch:
        """Read samples of equal shape as a micro-batch. For the other arguments see `Batch`.

        Args:
            samples: one that still has several captions gets its first.

        Raises:
            StoreError, MetadataError: see `__getitem__`.
        """
        samples = [sample.told(0) for sample in samples]
        outputs = [output for stage in self._cached for output in stage.yields]
        tensors: list[Tensors] = []
        for sample in samples:
            read: Tensors = {}
            for stage in self._cached:
                shard, key = sample.places[stage.name]
                names = [output.name for output in stage.yields]
                read |= stage.from_store(self._store.read_from(shard, key, names))
            tensors.append(read)
        return Batch(
            [sample.sample for sample in samples],
            visits,
            [sample.place for sample in samples],
            indices,
            seed,
            collate(outputs, tensors),
            [self._inputs(sample) for sample in samples],
            denoiser,
            scale,
        )

    def _sample(self, visit: Visit) -> Sample:
        """The sample of a visit, with the caption that is drawn for the visit."""
        sample = self._samples.at(visit.bucket, visit.index)
        if not sample.captions:
            return sample
        dropout = self._caption_dropout
        count = len(sample.captions) - (dropout > 0.0)  # the last one is the empty caption
        number = caption_index(self._seed, sample.sample, visit.visit, count, dropout)
        return sample.told(number)

    def _inputs(self, sample: Sample) -> dict[str, Any]:
        values = {i: sample.inputs[i.column] for i in self._step_inputs}
        return {
            i.column: load_files(json.loads(value), i, sample.row)
            if i.is_file
            else parse_value(value, i)
            for i, value in values.items()
        }


def steps_of(
    data: Dataset[list[Batch]], first: int, total_steps: int, workers: int
) -> Iterator[tuple[int, list[Batch]]]:
    """Yield each optimizer step, counted from 1, with its micro-batches.

    Args:
        data: step, counted from 0 → its micro-batches.
        first: steps that were made before.
        workers: number of processes that read ahead; with 0, this process reads.

    Raises:
        UserError: the data of a step cannot be read, in a worker or here; see `StepDataset`.
    """
    loader = DataLoader(
        _ErrorsAsValues(data),
        batch_size=None,  # an item of the data set is a whole step already
        sampler=range(first, total_steps),
        num_workers=workers,
    )
    # The iterator draws a random number when it is created. That happens here, not lazily in
    # the generator: the caller restores its random numbers after this call.
    return _numbered(iter(loader), first)


def _numbered(
    loaded: Iterator[list[Batch] | UserError], first: int
) -> Iterator[tuple[int, list[Batch]]]:
    """Number the steps, and raise a user error that was read in place of one; see `steps_of`."""
    try:
        for step, batches in enumerate(loaded, start=first + 1):
            if isinstance(batches, UserError):
                raise batches
            yield step, batches
    finally:
        # This ends the worker processes. The garbage collector would wait five seconds for each.
        del loaded


class _ErrorsAsValues(Dataset[list[Batch] | UserError]):
    """A data set that returns a `UserError` instead of raising it.

    torch raises a worker's exception again with a traceback as its message; a value arrives
    unchanged.
    """

    def __init__(self, data: Dataset[list[Batch]]) -> None:
        self._data = data

    def __getitem__(self, step: int) -> list[Batch] | UserError:
        """The micro-batches of a step, or why there are none."""
        try:
            return self._data[step]
        except UserError as error:
            return error
