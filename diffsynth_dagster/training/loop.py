"""The training loop, to be read from top to bottom: a training, its steps, and what they report."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing

import torch

from diffsynth_dagster.config.recipe import dump_config
from diffsynth_dagster.errors import Stopped
from diffsynth_dagster.files import write_text
from diffsynth_dagster.older import keep_tables
from diffsynth_dagster.run.earlier import drop_older
from diffsynth_dagster.run.events import Finished, Started
from diffsynth_dagster.run.record import RunRecord
from diffsynth_dagster.run.signals import finishing
from diffsynth_dagster.training.batches import Batch, steps_of
from diffsynth_dagster.training.device_values import Moment
from diffsynth_dagster.training.held_out import HeldOut
from diffsynth_dagster.training.lora import weight_norms
from diffsynth_dagster.training.optimizer_step import PendingSteps, peak_memory, train_step
from diffsynth_dagster.training.periodic import (
    Checkpoints,
    Periodic,
    SamplePictures,
    SavePoints,
    end_early,
    run_due,
)
from diffsynth_dagster.training.reports import Reports, renew
from diffsynth_dagster.training.resume import make_ready, restore
from diffsynth_dagster.training.sample_pictures import Pictures
from diffsynth_dagster.training.setup import Inputs, TrainingState, set_up
from diffsynth_dagster.training.states import States


def train(inputs: Inputs) -> RunRecord:
    """Train to the last step; returns the finished record. Collective.

    Raises:
        Stopped: the run was asked to stop.
        TrainingError: the loss is not finite.
        UserError: see `set_up`, and `StepDataset` for the data of a step.
    """
    # An error for lack of memory counts the weights and the optimizer's state from here.
    training = inputs.memory.training = set_up(inputs)
    with finishing():
        return _train(training)


def _train(training: TrainingState) -> RunRecord:
    """Make the steps of a training, and whatever is due between them; see `train`."""
    inputs = training.inputs
    config, reporter, run_file = inputs.config, inputs.reporter, inputs.run_file
    parallel = inputs.parallel
    # The record says at the end how many of the trained tensors have changed.
    before = _fingerprints(training.trained.items())
    state = inputs.state
    random = None if state is None else restore(training, state)
    # Moves another training away, and removes what this one wrote after its state.
    if parallel.is_main_process:
        make_ready(run_file.folder, state, reporter.warn)
        keep_tables(run_file.folder, inputs.manifests.train.folder)
        write_text(run_file.folder / "config.yaml", dump_config(config))
    run_file.begin(training.total_steps, weight_norms(training.step_module.components.items()))
    pictures = Pictures(training)
    order = training.data.order
    first, done = (0, 0) if state is None else (state.step, state.done)
    # If the state is at the last step of a training that was planned longer, the last step's
    # checkpoint and pictures are still missing. With the planned length, `end_early` makes them.
    planned = (
        state.record["total_steps"] if state is not None and first == training.total_steps else 0
    )
    points = SavePoints(config, order.steps_per_epoch, max(planned, training.total_steps))
    checkpoints = Checkpoints(points)
    checkpoints.warn_of_space(training)
    states = States(training, points)
    held_out = HeldOut(training, points)
    beside: list[Periodic] = [held_out, checkpoints]
    beside.append(SamplePictures(points, pictures, config.sample_steps))
    beside.append(Reports(points, beside))
    # Before the first step, or what a stop left undone after the step of the state.
    if run_due(beside, training, first, done) < len(beside):
        raise Stopped
    if state is None:
        pictures.evaluate("before")

    reporter.report(Started(training.total_steps, first))
    steps = steps_of(training.data, first, training.total_steps, config.dataset_num_workers)
    # Last of all: what came before, such as the data loader, drew random numbers.
    if random is not None:
        parallel.load_random(random)
    with closing(states):
        last = _make_steps(training, steps, beside, states, held_out) or first
        if not points.is_last(last):
            # A state first: if `end_early` is stopped, the next run goes on from here.
            if last > first:
                states.run(training, last, len(beside))
            end_early(beside, training, last)
        states.finish()

    return _finish(training, pictures, before, last, states.seconds)


def _finish(
    training: TrainingState,
    pictures: Pictures,
    before: dict[str, tuple[float, float]],
    last: int,
    seconds: float,
) -> RunRecord:
    """Evaluate the trained weights, and complete the record. Collective.

    Args:
        before: the fingerprints of the weights before the training.
        last: the last step.
        seconds: duration of all steps.
    """
    inputs, order = training.inputs, training.data.order
    reporter, run_file, parallel = inputs.reporter, inputs.run_file, inputs.parallel
    run_file.measured(
        steps=last,
        seconds=seconds,
        samples=order.samples_per_epoch * last // order.steps_per_epoch,
        peak_memory_bytes=peak_memory(parallel.device),
    )
    after = _fingerprints(training.trained.items())
    pictures.evaluate("after")
    training.losses.write(run_file.folder, parallel, reporter.warn)
    run_file.finished(len(after), sum(before[name] != after[name] for name in after))
    renew(inputs)
    if parallel.is_main_process:
        drop_older(run_file.folder, inputs.config.runs_keep, reporter.warn)
    record = run_file.record
    reporter.report(Finished(record.steps, record.evaluation))
    return record


def _make_steps(
    training: TrainingState,
    steps: Iterator[tuple[int, list[Batch]]],
    beside: Sequence[Periodic],
    states: States,
    held_out: HeldOut,
) -> int | None:
    """Make the steps, and after each whatever is due; returns the last step, None if there was
    none. Collective.

    Raises:
        Stopped: the run was asked to stop.
        TrainingError: the loss is not finite.
    """
    parallel, asked = training.inputs.parallel, training.inputs.stop_asked
    # Several processes must stop at the same step: each tells its signal with the step's loss.
    alone = parallel.num_processes == 1
    made, last = PendingSteps(training.inputs), None
    waiting = Moment(parallel.device)
    for step, batches in steps:
        if held_out.stops:
            break
        made.add(train_step(training, step, batches, waiting, lambda: (asked(), states.late)))
        due = states.due(step) or any(thing.due(step) for thing in beside)
        if due or made.stop or made.late or (alone and asked()):
            # First of all, so that nothing is saved of a step whose loss is not finite.
            made.read()
            # Fewer than all are done if a signal comes; the state says where to go on.
            done = run_due(beside, training, step)
            stops = made.stop or done < len(beside) or parallel.any(asked())
            if states.due(step) or made.late or stops:
                states.run(training, step, done)
                made.late = False
            if stops:
                raise Stopped
        last = step
        waiting = Moment(parallel.device)
    return last


def _fingerprints(parameters: Iterable[tuple[str, torch.Tensor]]) -> dict[str, tuple[float, float]]:
    """Two sums of each tensor's values, to see later whether they have changed."""
    return {
        name: (float(p.detach().double().sum()), float(p.detach().double().abs().sum()))
        for name, p in parameters
    }
