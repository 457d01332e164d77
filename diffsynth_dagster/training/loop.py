"""The training loop. Read top to bottom: a training, its steps, what they report."""

import math
import resource
import time
from contextlib import AbstractContextManager, closing, nullcontext

import torch

from diffsynth_dagster.config.recipe import dump_config
from diffsynth_dagster.errors import Stopped, TrainingError
from diffsynth_dagster.files import write_text
from diffsynth_dagster.older import keep_tables
from diffsynth_dagster.run.earlier import drop_older
from diffsynth_dagster.run.events import Finished, Started, StepMetrics
from diffsynth_dagster.run.record import RunRecord
from diffsynth_dagster.run.stop import finishing
from diffsynth_dagster.training.batches import Batch, steps_of
from diffsynth_dagster.training.held_out import HeldOut
from diffsynth_dagster.training.modules import fingerprints
from diffsynth_dagster.training.optimizer import current_rates
from diffsynth_dagster.training.periodic import (
    Checkpoints,
    SamplePictures,
    SavePoints,
    end_early,
    run_due,
)
from diffsynth_dagster.training.pictures import Pictures
from diffsynth_dagster.training.resume import make_ready, restore
from diffsynth_dagster.training.setup import Session, Work, set_up
from diffsynth_dagster.training.states import States


def train(session: Session) -> RunRecord:
    """Train to the end of the last epoch; returns the finished record. Collective.

    Raises:
        Stopped: the run was asked to stop.
        TrainingError: the loss is not finite.
        UserError: see `set_up`, and `StepDataset` for the data of a step.
    """
    work = session.memory.work = set_up(session)
    with finishing():
        return _train(work)


def _train(work: Work) -> RunRecord:
    """Make the steps of a training, and what is beside them; see `train`."""
    session = work.session
    config, reporter, run_file = session.config, session.reporter, session.run_file
    before = fingerprints(work.trained.items())
    state = session.state
    random = None if state is None else restore(work, state)
    # From here on nothing of another training is left.
    if session.parallel.is_main_process:
        make_ready(run_file.folder, state, reporter.warn)
        keep_tables(run_file.folder, session.manifest.folder)
        write_text(run_file.folder / "config.yaml", dump_config(config))
    run_file.begin(work.total_steps)
    pictures = Pictures(work)
    points = SavePoints(config, work.data.order.steps_per_epoch, work.total_steps)
    checkpoints = Checkpoints(points)
    checkpoints.warn_of_space(work)
    states = States(work)
    held_out = HeldOut(work, points)
    beside = [held_out, checkpoints, SamplePictures(points, pictures, config.sample_steps)]
    first, done = (0, 0) if state is None else (state.step, state.done)
    if run_due(beside, work, first, done) < len(beside):
        raise Stopped
    if state is None:
        pictures.evaluate("before")

    reporter.report(Started(work.total_steps, first))
    last = first
    steps = steps_of(work.data, first, work.total_steps, config.dataset_num_workers)
    if random is not None:
        session.parallel.load_random(random)
    with closing(states):
        waiting = time.perf_counter()
        for step, batches in steps:
            if held_out.stops:
                break
            metrics = train_step(work, step, batches, time.perf_counter() - waiting)
            reporter.report(metrics)
            _require_finite(session, metrics)
            run_file.stepped(metrics.loss)
            done = run_due(beside, work, step)
            asked = session.parallel.any(session.stop_asked()) or done < len(beside)
            if asked or states.due(step):
                states.run(work, step, done)
            if asked:
                raise Stopped
            last = step
            waiting = time.perf_counter()
        if last < work.total_steps:
            # Before what may be stopped: going on from there ends early at once.
            states.run(work, last, len(beside))
            end_early(beside, work, last)
        states.finish()

    run_file.measured(
        steps=last,
        seconds=states.seconds,
        samples=work.data.order.samples_per_epoch * config.num_epochs * last // work.total_steps,
        peak_memory_bytes=_peak_memory(session.parallel.device),
    )
    after = fingerprints(work.trained.items())
    pictures.evaluate("after")
    work.losses.write(run_file.folder, session.parallel)
    run_file.finished(len(after), sum(before[name] != after[name] for name in after))
    if session.parallel.is_main_process:
        drop_older(run_file.folder, config.runs_keep, reporter.warn)
    record = run_file.record
    reporter.report(Finished(record.steps, record.evaluation))
    return record


def train_step(
    work: Work, step: int, batches: list[Batch], data_seconds: float = 0.0
) -> StepMetrics:
    """One optimizer step over the micro-batches of this process. Collective.

    Args:
        step: counted from 1.
        data_seconds: that this process waited for the micro-batches.
    """
    config, parallel = work.session.config, work.session.parallel
    began = time.perf_counter()
    loss = torch.zeros((), device=parallel.device)
    for index, batch in enumerate(batches):
        last = index == len(batches) - 1
        with parallel.micro_batch(work.model, last), _saved_tensors(work):
            batch = batch.to(parallel.device)
            losses: torch.Tensor = work.model(batch)
            weighted = losses.sum() * batch.scale
            parallel.backward(weighted)
        loss += weighted.detach()
        work.losses.add(batch, losses, work.step_module.row_weights(batch))
    norm = parallel.clip(work.trained.values(), config.max_grad_norm)
    differentiated = time.perf_counter()
    rates = current_rates(work.optimizer)
    work.optimizer.step()
    work.optimizer.zero_grad()
    if not parallel.step_was_skipped:
        work.schedule.step()
    work.average.update(step)
    mean = parallel.mean(loss)
    ended = time.perf_counter()
    samples, tokens = work.data.counts(step - 1)
    whole = data_seconds + ended - began
    return StepMetrics(
        step=step,
        epoch=(step - 1) // work.data.order.steps_per_epoch,
        loss=mean,
        learning_rate=next(iter(rates.values())),
        grad_norm=norm,
        seconds=ended - began,
        samples=samples,
        tokens=tokens,
        data_seconds=data_seconds,
        forward_backward_seconds=differentiated - began,
        optimizer_seconds=ended - differentiated,
        samples_per_second=samples / whole,
        tokens_per_second=tokens / whole,
        learning_rates={name: rate for name, rate in rates.items() if name},
        peak_memory_bytes=_peak_memory(parallel.device),
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
