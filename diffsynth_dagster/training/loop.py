"""The training loop. Read top to bottom: a training, its steps, what they report."""

import math
import resource
import time
from contextlib import AbstractContextManager, nullcontext

import torch

from diffsynth_dagster.errors import Stopped, TrainingError
from diffsynth_dagster.training.batches import Batch, steps_of
from diffsynth_dagster.training.modules import fingerprints
from diffsynth_dagster.training.periodic import (
    Checkpoints,
    Periodic,
    SamplePictures,
    SavePoints,
    run_due,
)
from diffsynth_dagster.training.pictures import Pictures
from diffsynth_dagster.training.record import RunRecord
from diffsynth_dagster.training.reporting import StepMetrics
from diffsynth_dagster.training.setup import Session, Work, set_up


def train(session: Session) -> RunRecord:
    """Train to the end of the last epoch; returns the finished record. Collective.

    Raises:
        Stopped: the run was asked to stop.
        TrainingError: the loss is not finite.
        UserError: see `set_up`, and `StepDataset` for the data of a step.
    """
    config, reporter, run_file = session.config, session.reporter, session.run_file
    work = set_up(session)
    before = fingerprints(work.trained.items())
    pictures = Pictures(work)
    points = SavePoints(config, work.data.order.steps_per_epoch, work.total_steps)
    checkpoints = Checkpoints(points)
    checkpoints.warn_of_space(work)
    periodic: list[Periodic] = [checkpoints, SamplePictures(points, pictures)]
    run_due(periodic, work, 0)
    pictures.evaluate("before")

    reporter.started(work.total_steps, config)
    started = time.perf_counter()
    for step, batches in steps_of(work.data, work.total_steps, config.dataset_num_workers):
        if session.stop_asked():
            raise Stopped
        metrics = train_step(work, step, batches)
        reporter.stepped(metrics)
        _require_finite(session, metrics)
        run_file.stepped(metrics.loss)
        run_due(periodic, work, step)

    run_file.measured(
        steps=work.total_steps,
        seconds=time.perf_counter() - started,
        samples=work.data.order.samples_per_epoch * config.num_epochs,
        peak_memory_bytes=_peak_memory(session.parallel.device),
    )
    after = fingerprints(work.trained.items())
    pictures.evaluate("after")
    run_file.finished(len(after), sum(before[name] != after[name] for name in after))
    reporter.finished(run_file.record)
    return run_file.record


def train_step(work: Work, step: int, batches: list[Batch]) -> StepMetrics:
    """One optimizer step over the micro-batches of this process. Collective.

    Args:
        step: counted from 1.
    """
    config, parallel = work.session.config, work.session.parallel
    began = time.perf_counter()
    loss = torch.zeros((), device=parallel.device)
    for index, batch in enumerate(batches):
        last = index == len(batches) - 1
        with parallel.micro_batch(work.model, last), _saved_tensors(work):
            losses: torch.Tensor = work.model(batch.to(parallel.device))
            weighted = losses.sum() * batch.scale
            parallel.backward(weighted)
        loss += weighted.detach()
    norm = parallel.clip(work.trained.values(), config.max_grad_norm)
    learning_rate = work.optimizer.param_groups[0]["lr"]
    work.optimizer.step()
    work.optimizer.zero_grad()
    if not parallel.step_was_skipped:
        work.schedule.step()
    return StepMetrics(
        step=step,
        epoch=(step - 1) // work.data.order.steps_per_epoch,
        loss=parallel.mean(loss),
        learning_rate=learning_rate,
        grad_norm=norm,
        seconds=time.perf_counter() - began,
        samples=work.data.samples_in(step - 1),
    )


def _saved_tensors(work: Work) -> AbstractContextManager[object]:
    """Keep what the backward pass needs in CPU memory, if asked."""
    if not work.session.config.use_gradient_checkpointing_offload:
        return nullcontext()
    on_gpu = work.session.parallel.device.type == "cuda"
    return torch.autograd.graph.save_on_cpu(pin_memory=on_gpu)


def _require_finite(session: Session, metrics: StepMetrics) -> None:
    """Stop a training that went wrong before it writes a checkpoint of it.

    Raises:
        TrainingError: the loss is not finite, or the gradients that changed the weights were not.
    """
    # The norm is infinite in a step that float16 made the optimizer skip: the weights are sound.
    sound_norm = math.isfinite(metrics.grad_norm) or session.parallel.step_was_skipped
    if math.isfinite(metrics.loss) and sound_norm:
        return
    session.run_file.diverged()
    raise TrainingError(
        f"the training went astray in step {metrics.step}: the loss is {metrics.loss:g}, and "
        f"the norm of its gradient {metrics.grad_norm:g}",
        where=f"learning_rate = {metrics.learning_rate:g}",
        do="give a smaller learning_rate, or max_grad_norm; checkpoints written before are sound",
    )


def _peak_memory(device: torch.device) -> int:
    """Most memory used so far: of the GPU, or of the process on a CPU. Bytes."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
