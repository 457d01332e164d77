"""The held-out loss: the loss of samples that are not trained on.

It is measured with fixed noise at fixed timesteps, which depend on the samples alone. So two
measurements differ only by the weights: the seed, the batch size and the number of processes of a
training do not matter. Each sample is measured once in each of `validation_timesteps` equal ranges
of the trained part of the schedule.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from operator import itemgetter

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

_RISEN, _IN_A_ROW = 1.05, 3
"""The last `_IN_A_ROW` held-out losses are this many times the smallest one: the model memorises."""
SEED = 0
"""Seed of the noise and timesteps, whatever the seed of the training."""


@dataclass(frozen=True)
class Look:
    """One measurement of one sample.

    Attributes:
        denoiser: that is trained at this timestep.
        bucket, index: position of the sample.
        range: number of the range of the schedule.
        timestep: as an index into the schedule.
    """

    denoiser: str
    bucket: int
    index: int
    range: int
    timestep: int


class HeldOut:
    """Measures the held-out loss every `validation_steps`, or with each checkpoint; keeps the best
    weights, and says when to stop early.

    Does nothing if no samples are held out.
    """

    def __init__(self, training: TrainingState, points: SavePoints) -> None:
        config = training.inputs.config
        self._points = points
        self._every = config.validation_steps
        self._patience = config.early_stopping_patience
        self._sets = [
            s for s in (training.samples.held_out, training.samples.compared) if s is not None
        ]
        self._history = [_metrics(stored) for stored in training.inputs.run_file.record.held_out]
        # A resumed training does not warn a second time.
        ends = range(1, len(self._history) + 1)
        self._warned = any(memorises(self._history[:end]) for end in ends)

    @property
    def stops(self) -> bool:
        """Whether the last `early_stopping_patience` measurements brought no smaller loss."""
        if self._patience is None or not self._history:
            return False
        later = [m for m in self._history if m.step > self._history[-1].best_step]
        # The measurement before the first step does not count: its best step is 0.
        return self._history[-1].best_step > 0 and len(later) >= self._patience

    def due(self, step: int) -> bool:
        """Whether the loss is measured after a step: before the first, after the last, and in
        between."""
        if not self._sets:
            return False
        if step == 0 or self._points.is_last(step):
            return True
        if self._every is None:
            return self._points.name(step) is not None
        return step % self._every == 0

    def run(self, training: TrainingState, step: int) -> None:
        """Measure the loss and report it. Collective.

        Raises:
            OutputError: the best weights cannot be written.
            Stopped: the run was asked to stop. A partial measurement is discarded.
        """
        inputs = training.inputs
        held_out, compared = (measure(training, samples) for samples in self._sets)
        loss, trained_loss = (_mean([x for _, x in losses]) for losses in (held_out, compared))
        by_range = groupby(sorted(held_out, key=itemgetter(0)), itemgetter(0))
        ranges = [_mean([x for _, x in losses]) for _, losses in by_range]
        later = [(m.loss, m.step) for m in self._history if m.step > 0]
        # NaN is taken as the worst loss: compared as it is, it could come out as the smallest.
        _, best_step = min((math.inf if math.isnan(x) else x, n) for x, n in [*later, (loss, step)])
        metrics = HeldOutMetrics(step, loss, trained_loss, ranges, best_step)
        self._history.append(metrics)
        # After going on from a state the best files may be gone: a later step had replaced them.
        lacks = metrics.best_step == step or not inputs.run_file.record.best
        if inputs.config.keep_best and step > 0 and lacks:
            self._keep(training, step)
        inputs.run_file.held_out(asdict(metrics))
        inputs.reporter.report(metrics)
        if not self._warned and memorises(self._history):
            self._warned = True
            inputs.reporter.warn(_warning(self._history, inputs.config.keep_best))

    def _keep(self, training: TrainingState, step: int) -> None:
        """Write the weights, and remove the previous best ones."""
        inputs = training.inputs
        written = save_weights(training, step, f"best-step-{step}")
        previous = [*inputs.run_file.record.best]
        inputs.run_file.saved_best({p.name: digest for p, digest in written.items()})
        if inputs.parallel.is_main_process:
            for path in written:
                inputs.reporter.report(Saved(step, str(path)))
            for name in previous:
                (inputs.run_file.folder / name).unlink(missing_ok=True)
        inputs.parallel.wait_for_everyone()


def measure(training: TrainingState, samples: Samples) -> list[tuple[int, float]]:
    """Range of the schedule and loss of each look at each sample. Collective.

    The batches are cut before they are distributed, and the losses keep the order of the looks: the
    result does not depend on the number of processes.

    Raises:
        Stopped: the run was asked to stop.
    """
    inputs = training.inputs
    config, parallel = inputs.config, inputs.parallel
    # As one process of one: this only reads; the batches are distributed below.
    data = StepDataset(config, inputs.models.resolved, samples, 0, 1)
    batches = list(_batches(looks_of(training, samples), config.batch_size))
    losses: list[tuple[int, list[float]]] = []
    on_gpu = [parallel.device] if parallel.device.type == "cuda" else []
    with (
        evaluated_weights(training),
        evaluating(training.step_module),
        torch.random.fork_rng(on_gpu),  # the training draws on as if nothing were measured
        torch.no_grad(),
        parallel.autocast(),
    ):
        for turn in range(0, len(batches), parallel.num_processes):
            if parallel.any(inputs.stop_asked()):
                raise Stopped
            # Every process makes equally many calls, since a prepared model may wait for all
            # of them. One that has no batch left repeats the last.
            number = min(turn + parallel.process_index, len(batches) - 1)
            batch = _read(data, samples, batches[number]).to(parallel.device)
            losses.append((number, training.model(batch).float().tolist()))
    everywhere = dict(parallel.gathered(losses))
    return [
        (look.range, loss)
        for number, batch in enumerate(batches)
        for look, loss in zip(batch, everywhere[number], strict=True)
    ]


def looks_of(training: TrainingState, samples: Samples) -> list[Look]:
    """All looks at all samples, with those of equal denoiser and shape next to each other."""
    inputs = training.inputs
    config, model = inputs.config, inputs.models.resolved
    shares = model.schedule.shares
    indices = [index for share in shares for index in range(share.low, share.high)]
    denoiser_at = {i: share.component for share in shares for i in range(share.low, share.high)}
    # Distillation has no timesteps to draw, so one look says all.
    count = 1 if config.distills else min(config.validation_timesteps, len(indices))
    # Equal ranges of the indices that any denoiser is trained at.
    bounds = [round(len(indices) * k / count) for k in range(count + 1)]
    looks: list[Look] = []
    for bucket, size in enumerate(samples.buckets):
        for index in range(size):
            name = samples.at(bucket, index).sample
            for k in range(count):
                drawn = indices[timestep_index(SEED, name, k, bounds[k], bounds[k + 1])]
                looks.append(Look(denoiser_at[drawn], bucket, index, k, drawn))
    order = {share.component: number for number, share in enumerate(shares)}
    return sorted(looks, key=lambda look: (order[look.denoiser], look.bucket))


def _batches(looks: Sequence[Look], size: int) -> Iterator[list[Look]]:
    """Runs of at most `size` looks at samples of equal shape, all of one denoiser."""
    for _, group in groupby(looks, lambda look: (look.denoiser, look.bucket)):
        together = list(group)
        for start in range(0, len(together), size):
            yield together[start : start + size]


def _read(data: StepDataset, samples: Samples, looks: Sequence[Look]) -> Batch:
    return data.read(
        [samples.at(look.bucket, look.index) for look in looks],
        [look.range for look in looks],  # as the visit, so that each look has its own noise
        [look.timestep for look in looks],
        SEED,
        looks[0].denoiser,
        1.0,
    )


def memorises(history: Sequence[HeldOutMetrics]) -> bool:
    """Whether the last measurements say clearly that the model memorises: each held-out loss is
    well above the smallest one, though that of the trained samples is smaller than it was then."""
    best = _best_of(history)
    last = [m for m in history if m.step > best.step][-_IN_A_ROW:] if best is not None else []
    return len(last) == _IN_A_ROW and all(
        best is not None and m.loss > _RISEN * best.loss and m.trained_loss < best.trained_loss
        for m in last
    )


def _best_of(history: Sequence[HeldOutMetrics]) -> HeldOutMetrics | None:
    """The measurement with the smallest held-out loss; None before the first step."""
    if not history or history[-1].best_step == 0:
        return None
    return next((m for m in history if m.step == history[-1].best_step), None)


def _warning(history: Sequence[HeldOutMetrics], keeps: bool) -> str:
    """What is said of a training that memorises."""
    best, now = _best_of(history), history[-1]
    assert best is not None
    kept = f"best-step-{best.step} is kept" if keeps else "keep_best would keep those weights"
    return (
        f"the model memorises: since step {best.step} the held-out loss has risen from {best.loss:.4f} "
        f"to {now.loss:.4f}, while that of trained samples has fallen from {best.trained_loss:.4f} to "
        f"{now.trained_loss:.4f}; {kept}, and fewer steps or more rows help"
    )


def _mean(losses: Sequence[float]) -> float:
    return sum(losses) / len(losses)


def _metrics(stored: dict[str, object]) -> HeldOutMetrics:
    return HeldOutMetrics(**stored)  # pyright: ignore[reportArgumentType]  (as `asdict` gave it)
