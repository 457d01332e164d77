"""Sets up a training before its first step: modules, optimizer, learning rate, average."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from diffsynth_dagster.config.parameters import TrainingConfig
from diffsynth_dagster.data.order import total_steps
from diffsynth_dagster.run.record import RunFile
from diffsynth_dagster.run.reporting import Reporter
from diffsynth_dagster.training.batches import StepDataset
from diffsynth_dagster.training.build import build_step
from diffsynth_dagster.training.ema import Average, make_average, refuse_average
from diffsynth_dagster.training.encoded_data import Manifests, Resolved
from diffsynth_dagster.training.optimizer import (
    make_optimizer,
    make_schedule,
    parameter_groups,
)
from diffsynth_dagster.training.parallel import Parallel
from diffsynth_dagster.training.row_losses import RowLosses
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
        parallel: the processes of the training.
        models: the components, loaded when they are used.
        stop_asked: says whether the run was asked to stop.
        state: the state to go on from; None to start from the beginning.
        samples: where the samples are stored that are trained on or held out.
        data: step, counted from 0 → the micro-batches of this process.
        memory: explains a lack of memory.
    """

    config: TrainingConfig
    parallel: Parallel
    models: Models
    manifests: Manifests
    run_file: RunFile
    reporter: Reporter
    stop_asked: Callable[[], bool]
    state: WrittenState | None
    samples: Resolved
    data: StepDataset
    memory: "Memory"


@dataclass(frozen=True)
class TrainingState:
    """A training in progress: its inputs, and what was built from them.

    Attributes:
        step_module: batch → losses, as this process built it.
        model: the same module, prepared for all processes together.
        trained: name in `step_module` → trained parameter of the prepared module.
        optimizer: prepared, too.
        schedule: of the learning rate.
        data, samples: see `Inputs`.
        losses: how hard each sample is.
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
    losses: RowLosses
    total_steps: int
    average: Average


def make_models(config: TrainingConfig, model: ResolvedModel, parallel: Parallel) -> Models:
    """The components of a model. Each is loaded on this process's device when it is used."""
    # A component that gets a LoRA is stored in float8 after the LoRA was added: see `build`.
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
        UserError: see `build_step`, `make_optimizer`, `make_schedule`, `refuse_average`.
    """
    config, parallel = inputs.config, inputs.parallel
    step_module = build_step(config, inputs.models, parallel.trained_dtype)
    # Before `prepare`: DDP and DeepSpeed wrap the module, which changes the names.
    trainable = {n: p for n, p in step_module.named_parameters() if p.requires_grad}
    groups = parameter_groups(config, inputs.models.resolved.family, trainable)
    # Muon leaves these to AdamW.
    tables = [m.weight for m in step_module.modules() if isinstance(m, nn.Embedding)]
    optimizer = make_optimizer(config, groups, tables)
    samples, data = inputs.samples, inputs.data
    steps = total_steps(config, data.order.steps_per_epoch)
    schedule = make_schedule(config, optimizer, steps)
    if parallel.synchronises_gradients and not config.find_unused_parameters:
        # DDP waits for each parameter's gradient, and fails if one has none.
        parallel.expect_gradients(step_module, _who_gets_gradients(inputs, step_module, data))
    refuse_average(config, parallel, optimizer)
    model, prepared = parallel.prepare(config, step_module, optimizer)
    step_module.find_compute_dtypes()  # DeepSpeed casts whole modules
    trained = parallel.trained(model, trainable)
    # From the prepared parameters, which are those that the optimizer updates.
    average = make_average(config, trained, optimizer)
    timesteps = None if config.distills else len(inputs.models.resolved.noising.timesteps)
    losses = RowLosses(samples.trained, timesteps)
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
    """Name of each trained parameter → whether it gets a gradient from the first batch of this
    process.

    None if that differs from step to step: with several denoisers, or if samples may lack a target.
    """
    model, parallel = inputs.models.resolved, inputs.parallel
    outputs = [output for stage in model.family.stages for output in stage.yields]
    if len(model.denoisers) > 1 or any(output.optional for output in outputs):
        return None
    batch = data[0][0].to(parallel.device)
    on_gpu = parallel.device.type == "cuda"
    # Forked: the training draws its random numbers, such as dropout, as if this had not run.
    with torch.random.fork_rng([parallel.device] if on_gpu else []), parallel.autocast():
        step_module(batch).sum().backward()
    trained = {n: p for n, p in step_module.named_parameters() if p.requires_grad}
    got_one = {name: parameter.grad is not None for name, parameter in trained.items()}
    # To none, so that no gradient of this batch is left for the first step.
    step_module.zero_grad(set_to_none=True)
    return got_one
