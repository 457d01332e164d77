"""One optimizer step: its work is queued on the device, and its results are read later."""

import math
import resource
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from diffsynth_dagster.errors import TrainingError
from diffsynth_dagster.run.events import StepMetrics
from diffsynth_dagster.training.batches import Batch
from diffsynth_dagster.training.device_values import Moment, Numbers
from diffsynth_dagster.training.gradient_checkpointing import saved_tensors
from diffsynth_dagster.training.optimizer import current_rates
from diffsynth_dagster.training.setup import Inputs, TrainingState


@dataclass(frozen=True)
class PendingStep:
    """An optimizer step that was queued on the device, which may still be working on it.

    Attributes:
        known: its metrics; those that only the device knows are NaN.
        numbers: loss, gradient norm, and for each flag of `train_step` the fraction of the
            processes that set it.
        waiting, began, differentiated: when the wait for the data, the step, and the optimizer's
            part of the step began.
        skipped: whether the optimizer skipped the step because gradients overflowed in float16.
    """

    known: StepMetrics
    numbers: Numbers
    waiting: Moment
    began: Moment
    differentiated: Moment
    skipped: bool

    def metrics(self) -> StepMetrics:
        """All metrics of the step. Waits until the device has finished it."""
        loss, norm, *_ = self.numbers.read()
        ended = self.numbers.there
        data_seconds, seconds = self.began.since(self.waiting), ended.since(self.began)
        whole = data_seconds + seconds
        return replace(
            self.known,
            loss=loss,
            grad_norm=norm,
            seconds=seconds,
            data_seconds=data_seconds,
            forward_backward_seconds=self.differentiated.since(self.began),
            optimizer_seconds=ended.since(self.differentiated),
            samples_per_second=self.known.samples / whole,
            tokens_per_second=self.known.tokens / whole,
        )

    @property
    def flags(self) -> tuple[bool, bool]:
        """The flags of `train_step`. Each is true on all processes if one of them set it."""
        _, _, stop, late = self.numbers.read()
        return stop > 0, late > 0


def train_step(
    training: TrainingState,
    step: int,
    batches: list[Batch],
    waiting: Moment,
    flags: Callable[[], tuple[bool, bool]],
) -> PendingStep:
    """Queue one optimizer step over the micro-batches of this process. Collective.

    Args:
        step: counted from 1.
        waiting: when the wait for the micro-batches began.
        flags: returns whether the run was asked to stop, and whether a state is late. Called at the
            end of the step; all processes learn the answers together with the loss.
    """
    config, parallel = training.inputs.config, training.inputs.parallel
    began = Moment(parallel.device)
    loss = torch.zeros((), device=parallel.device)
    for index, batch in enumerate(batches):
        batch = batch.to(parallel.device)
        # Only the last one reduces gradients over the processes.
        losses = differentiate(training, batch, last=index == len(batches) - 1)
        loss += losses.sum() * batch.scale
        training.losses.add(batch, losses, training.step_module.row_weights(batch))
    norm = parallel.clip(training.trained.values(), config.max_grad_norm)
    differentiated = Moment(parallel.device)
    rates = current_rates(training.optimizer)  # before the schedule moves on
    training.optimizer.step()
    training.optimizer.zero_grad()
    skipped = parallel.step_was_skipped
    # The learning rate follows the steps that were really made.
    if not skipped:
        training.schedule.step()
    training.average.update(step)
    asked = [torch.full((), float(flag), device=parallel.device) for flag in flags()]
    # One reduction for all three, since each makes the processes wait for each other.
    mean, *fractions = parallel.mean(torch.stack([loss, *asked]))
    numbers = Numbers(torch.stack([mean, norm, *fractions]))
    # `data` counts steps from 0, the metrics from 1.
    samples, tokens = training.data.counts(step - 1)
    known = StepMetrics(
        step=step,
        epoch=(step - 1) // training.data.order.steps_per_epoch,
        loss=math.nan,  # filled in by `metrics`, as all that is NaN here
        learning_rate=next(iter(rates.values())),
        grad_norm=math.nan,
        seconds=math.nan,
        samples=samples,
        tokens=tokens,
        learning_rates={name: rate for name, rate in rates.items() if name},
        peak_memory_bytes=peak_memory(parallel.device),
    )
    return PendingStep(known, numbers, waiting, began, differentiated, skipped)


def differentiate(training: TrainingState, batch: Batch, last: bool) -> torch.Tensor:
    """Add the gradients of a micro-batch to those of the step; returns its losses (B,), detached.
    The activations are freed when this returns."""
    parallel = training.inputs.parallel
    with (
        parallel.micro_batch(training.model, last),
        saved_tensors(training.inputs.config, parallel.device),
    ):
        losses: torch.Tensor = training.model(batch)
        parallel.backward(losses.sum() * batch.scale)
    return losses.detach()


class PendingSteps:
    """The steps that are queued and not reported yet: on a GPU the newest one, on a CPU none.

    Attributes:
        stop: whether the run was asked to stop, as far as steps were reported.
        late: whether a state is late, likewise. The loop resets it.
    """

    def __init__(self, inputs: Inputs) -> None:
        self._inputs = inputs
        self._unread: list[PendingStep] = []
        self.stop = self.late = False

    def add(self, made: PendingStep) -> None:
        """Add a step, and report the one before it; on a CPU, the step itself.

        Raises:
            TrainingError: see `read`.
        """
        self._unread.append(made)
        # On a GPU, the step before is finished by now or soon: reading it does not stall the queue.
        self._report_all_but(1 if self._inputs.parallel.runs_behind else 0)

    def read(self) -> None:
        """Report all queued steps. Waits until the device has finished them.

        Raises:
            TrainingError: the loss is not finite, or the gradients that changed the weights were
                not.
        """
        self._report_all_but(0)

    def _report_all_but(self, newest: int) -> None:
        """Report all queued steps except this many of the newest."""
        inputs = self._inputs
        while len(self._unread) > newest:
            made = self._unread.pop(0)
            metrics = made.metrics()
            # Reported before it is judged, so that the log shows the loss that failed.
            inputs.reporter.report(metrics)
            _require_finite(inputs, metrics, made.skipped)
            inputs.run_file.stepped(metrics.loss)
            stop, late = made.flags
            self.stop, self.late = self.stop or stop, self.late or late


def _require_finite(inputs: Inputs, metrics: StepMetrics, skipped: bool) -> None:
    """Stop a training that has diverged, before it writes a checkpoint.

    Raises:
        TrainingError: the loss is not finite, or the gradients that changed the weights were not.
    """
    # In a skipped step the norm is infinite, but the weights are unchanged.
    if math.isfinite(metrics.loss) and (math.isfinite(metrics.grad_norm) or skipped):
        return
    inputs.run_file.diverged()
    raise TrainingError(
        f"the training went astray in step {metrics.step}: the loss is {metrics.loss:g}, and "
        f"the norm of its gradient {metrics.grad_norm:g}",
        where=f"learning_rate = {metrics.learning_rate:g}",
        do="give a smaller learning_rate, or max_grad_norm; checkpoints written before are sound",
    )


def peak_memory(device: torch.device) -> int:
    """Peak memory so far, in bytes: of the GPU, or of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # KiB
