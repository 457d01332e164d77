"""Before the first step: what is trained, its optimizer and learning rate, and its data."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from diffsynth_dagster.cache.manifest import Manifest
from diffsynth_dagster.config.parameters import TrainingConfig
from diffsynth_dagster.data.order import total_steps
from diffsynth_dagster.run.record import RunFile
from diffsynth_dagster.run.reporting import Reporter
from diffsynth_dagster.training.batches import StepDataset
from diffsynth_dagster.training.build import build_step
from diffsynth_dagster.training.ema import Average, make_average, refuse_average
from diffsynth_dagster.training.encoded_data import Resolved
from diffsynth_dagster.training.optimizer import (
    make_optimizer,
    make_schedule,
    parameter_groups,
)
from diffsynth_dagster.training.parallel import Parallel
from diffsynth_dagster.training.sample_losses import SampleLosses
from diffsynth_dagster.training.state import WrittenState
from diffsynth_dagster.training.step import TrainingStep
from diffsynth_dagster.weights.models import Models
from diffsynth_dagster.weights.resolved import ResolvedModel

if TYPE_CHECKING:
    from diffsynth_dagster.training.memory import Memory


@dataclass(frozen=True)
class Inputs:
    """What a training is given.

    Attributes:
        state: what it goes on from; None from the beginning.
        samples, data: what it is trained on, and step by step.
        memory: what says what takes the memory, where there is not enough.
    """

    config: TrainingConfig
    parallel: Parallel
    models: Models
    manifest: Manifest
    run_file: RunFile
    reporter: Reporter
    stop_asked: Callable[[], bool]
    state: WrittenState | None
    samples: Resolved
    data: StepDataset
    memory: "Memory"


@dataclass(frozen=True)
class TrainingState:
    """A training in progress: what the session gave, and what was built from it.

    Attributes:
        step_module: batch → losses, as this process built it.
        model: the same as all processes run it together.
        trained: name in `step_module` → parameter of the prepared module, for those that are trained.
        data: step, counted from 0 → the micro-batches of this process.
        samples: what is trained on, and what is held out.
        losses: of the samples, visit by visit.
        total_steps: optimizer steps of the whole training.
        average: of the trained weights over the steps; see `ema.evaluated_weights`.
    """

    inputs: Inputs
    step_module: TrainingStep
    model: nn.Module
    trained: dict[str, nn.Parameter]
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    data: StepDataset
    samples: Resolved
    losses: SampleLosses
    total_steps: int
    average: Average


def make_models(config: TrainingConfig, model: ResolvedModel, parallel: Parallel) -> Models:
    """The components of a model, to be loaded on this process's device when they are used."""
    # A component that gets a LoRA is put into float8 after the LoRA: see `build_step`.
    lora_first = {model.family.part(name).of for name in config.lora_base_model}
    return Models(
        model,
        parallel.device,
        parallel.dtype,
        config.initialize_model_on_cpu,
        frozenset(lora_first),
    )


def set_up(inputs: Inputs) -> TrainingState:
    """Build everything that a training needs. Collective: every process calls it.

    Raises:
        UserError: see `build_step`, `make_optimizer`, `make_schedule`.
    """
    config, parallel = inputs.config, inputs.parallel
    step_module = build_step(config, inputs.models, parallel.trained_dtype)
    given = {n: p for n, p in step_module.named_parameters() if p.requires_grad}
    groups = parameter_groups(config, inputs.models.resolved.family, given)
    tables = [m.weight for m in step_module.modules() if isinstance(m, nn.Embedding)]
    optimizer = make_optimizer(config, groups, tables)
    samples, data = inputs.samples, inputs.data
    steps = total_steps(config, data.order.steps_per_epoch)
    schedule = make_schedule(config, optimizer, steps)
    if parallel.synchronises_gradients and not config.find_unused_parameters:
        parallel.expect_gradients(step_module, _who_gets_gradients(inputs, step_module, data))
    refuse_average(config, parallel, optimizer)
    model, prepared = parallel.prepare(config, step_module, optimizer)
    trained = parallel.trained(model, given)
    average = make_average(config, trained, optimizer)
    losses = SampleLosses(samples.trained, len(inputs.models.resolved.noising.timesteps))
    return TrainingState(
        inputs,
        step_module,
        model,
        trained,
        prepared,
        schedule,
        data,
        samples,
        losses,
        steps,
        average,
    )


def _who_gets_gradients(
    inputs: Inputs, step_module: TrainingStep, data: StepDataset
) -> dict[str, bool] | None:
    """Name of each trained parameter → whether it gets a gradient, by the first batch of this process;
    None where that differs from step to step: between denoisers, and where a sample may lack a
    target."""
    found, parallel = inputs.models.resolved, inputs.parallel
    outputs = [output for stage in found.family.stages for output in stage.yields]
    if len(found.denoisers) > 1 or any(output.optional for output in outputs):
        return None
    batch = data[0][0].to(parallel.device)
    on_gpu = parallel.device.type == "cuda"
    # Random numbers of the training, such as those of dropout, are drawn as without this.
    with torch.random.fork_rng([parallel.device] if on_gpu else []), parallel.autocast():
        step_module(batch).sum().backward()
    trained = {n: p for n, p in step_module.named_parameters() if p.requires_grad}
    got_one = {name: parameter.grad is not None for name, parameter in trained.items()}
    step_module.zero_grad(set_to_none=True)
    return got_one
