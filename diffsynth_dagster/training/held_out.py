"""The held-out loss: that of samples which are not trained on.

It is measured with fixed noise at fixed timesteps, which follow from the samples alone, so that two
measurements differ by the weights, and by nothing else: not by the seed, the batch size or the number
of processes of a training. Each sample is measured once in each of `validation_timesteps` equal ranges
of the part of the schedule that is trained.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby

import torch

from diffsynth_dagster.cache.resolve import Samples
from diffsynth_dagster.errors import Stopped
from diffsynth_dagster.objective.noise import timestep_index
from diffsynth_dagster.run.events import HeldOutMetrics, Saved
from diffsynth_dagster.training.batches import Batch, StepDataset
from diffsynth_dagster.training.ema import evaluated_weights
from diffsynth_dagster.training.periodic import SavePoints, save_weights
from diffsynth_dagster.training.setup import TrainingState
from diffsynth_dagster.training.step import evaluating

SEED = 0
"""Of the noise and the timesteps, whatever that of the training is."""


@dataclass(frozen=True)
class Look:
    """One look at one sample: its bucket and place, the range of the schedule, the timestep as an index
    of the schedule, and the denoiser at work there."""

    denoiser: str
    bucket: int
    index: int
    range: int
    timestep: int


class HeldOut:
    """Measures the held-out loss every `validation_steps`, or with each checkpoint; keeps the best
    weights, and says when it is no use to go on.

    Does nothing where nothing is held out.
    """

    def __init__(self, training: TrainingState, points: SavePoints) -> None:
        config = training.inputs.config
        self._points = points
        self._every = config.validation_steps
        self._patience = config.early_stopping_patience
        self._sets = [
            s for s in (training.samples.held_out, training.samples.compared) if s is not None
        ]
        self._history = [_metrics(said) for said in training.inputs.run_file.record.held_out]

    @property
    def stops(self) -> bool:
        """Whether the loss was not smaller than before for `early_stopping_patience` times."""
        if self._patience is None or not self._history:
            return False
        later = [m for m in self._history if m.step > self._history[-1].best_step]
        return self._history[-1].best_step > 0 and len(later) >= self._patience

    def due(self, step: int) -> bool:
        """Whether it is measured after a step: before the first, after the last, and between."""
        if not self._sets:
            return False
        if step == 0 or self._points.is_last(step):
            return True
        if self._every is None:
            return self._points.name(step) is not None
        return step % self._every == 0

    def run(self, training: TrainingState, step: int) -> None:
        """Measure it. Collective.

        Raises:
            OutputError: the best weights cannot be written.
            Stopped: the run was asked to stop. Nothing is noted of a part of a measurement.
        """
        inputs = training.inputs
        held_out, compared = (measure(training, samples) for samples in self._sets)
        loss, trained_loss = (_mean([each for _, each in of]) for of in (held_out, compared))
        in_ranges = groupby(sorted(held_out, key=lambda each: each[0]), lambda each: each[0])
        ranges = [_mean([each for _, each in of]) for _, of in in_ranges]
        later = [(m.loss, m.step) for m in self._history if m.step > 0]
        # A loss that is not a number is the worst.
        _, best_step = min((math.inf if math.isnan(x) else x, n) for x, n in [*later, (loss, step)])
        metrics = HeldOutMetrics(step, loss, trained_loss, ranges, best_step)
        self._history.append(metrics)
        # The best files may be gone after a stop: those that took their place were of later steps.
        lacks = metrics.best_step == step or not inputs.run_file.record.best
        if inputs.config.keep_best and step > 0 and lacks:
            self._keep(training, step)
        inputs.run_file.held_out(asdict(metrics))
        inputs.reporter.report(metrics)

    def _keep(self, training: TrainingState, step: int) -> None:
        """Write the weights, and remove those that were the best before."""
        inputs = training.inputs
        written = save_weights(training, step, f"best-step-{step}")
        before = [*inputs.run_file.record.best]
        inputs.run_file.saved_best({p.name: digest for p, digest in written.items()})
        if inputs.parallel.is_main_process:
            for path in written:
                inputs.reporter.report(Saved(step, str(path)))
            for name in before:
                (inputs.run_file.folder / name).unlink(missing_ok=True)
        inputs.parallel.wait_for_everyone()


def measure(training: TrainingState, samples: Samples) -> list[tuple[int, float]]:
    """Range of the schedule and loss of every look at every sample. Collective.

    Batches are cut before they are shared among the processes, and the losses are in the order of the
    looks: the result does not depend on how many processes there are.

    Raises:
        Stopped: the run was asked to stop.
    """
    inputs = training.inputs
    config, parallel = inputs.config, inputs.parallel
    data = StepDataset(config, inputs.models.resolved, samples, 0, 1)
    batches = list(_batches(looks_of(training, samples), config.batch_size))
    losses: list[tuple[int, list[float]]] = []
    on_gpu = [parallel.device] if parallel.device.type == "cuda" else []
    with (
        evaluated_weights(training),
        evaluating(training.step_module),
        torch.random.fork_rng(on_gpu),
        torch.no_grad(),
        parallel.autocast(),
    ):
        for turn in range(0, len(batches), parallel.num_processes):
            if parallel.any(inputs.stop_asked()):
                raise Stopped
            # All processes make as many: a model that is shared among them waits for each.
            number = min(turn + parallel.process_index, len(batches) - 1)
            found = training.model(_read(data, samples, batches[number]).to(parallel.device))
            losses.append((number, found.float().tolist()))
    everywhere = dict(parallel.gathered(losses))
    return [
        (look.range, loss)
        for number, batch in enumerate(batches)
        for look, loss in zip(batch, everywhere[number], strict=True)
    ]


def looks_of(training: TrainingState, samples: Samples) -> list[Look]:
    """Every look at every sample, those of one denoiser and shape next to each other."""
    inputs = training.inputs
    config, found = inputs.config, inputs.models.resolved
    shares = found.schedule.shares
    indices = [index for share in shares for index in range(share.low, share.high)]
    of = {i: share.component for share in shares for i in range(share.low, share.high)}
    count = 1 if config.distills else min(config.validation_timesteps, len(indices))
    bounds = [round(len(indices) * k / count) for k in range(count + 1)]
    looks: list[Look] = []
    for bucket, size in enumerate(samples.buckets):
        for index in range(size):
            name = samples.at(bucket, index).sample
            for k in range(count):
                drawn = indices[timestep_index(SEED, name, k, bounds[k], bounds[k + 1])]
                looks.append(Look(of[drawn], bucket, index, k, drawn))
    order = {share.component: number for number, share in enumerate(shares)}
    return sorted(looks, key=lambda look: (order[look.denoiser], look.bucket))


def _batches(looks: Sequence[Look], size: int) -> Iterator[list[Look]]:
    """Runs of at most `size` looks at samples of equal shape, all of one denoiser."""
    for _, of in groupby(looks, lambda look: (look.denoiser, look.bucket)):
        together = list(of)
        for start in range(0, len(together), size):
            yield together[start : start + size]


def _read(data: StepDataset, samples: Samples, looks: Sequence[Look]) -> Batch:
    return data.read(
        [samples.at(look.bucket, look.index) for look in looks],
        [look.range for look in looks],  # each look has noise of its own
        [look.timestep for look in looks],
        SEED,
        looks[0].denoiser,
        1.0,
    )


def _mean(losses: Sequence[float]) -> float:
    return sum(losses) / len(losses)


def _metrics(said: dict[str, object]) -> HeldOutMetrics:
    return HeldOutMetrics(**said)  # pyright: ignore[reportArgumentType]  (as `asdict` gave it)
