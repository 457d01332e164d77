"""The training loop. Read top to bottom: what is trained, each step, what is written."""

import math
import resource
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from PIL import Image
from torch.utils.data import DataLoader

from diffsynth_dagster.cache.encode import step_components
from diffsynth_dagster.cache.manifest import Manifest
from diffsynth_dagster.cache.resolve import Samples
from diffsynth_dagster.config.effect import trained_components
from diffsynth_dagster.config.parameters import TrainingConfig
from diffsynth_dagster.dotted import import_dotted
from diffsynth_dagster.errors import ParameterError, Stopped, TrainingError
from diffsynth_dagster.facts import digest_file
from diffsynth_dagster.files import write_whole
from diffsynth_dagster.training.batches import Batch, StepDataset
from diffsynth_dagster.training.checkpoint import strip_prefix, trained_state, write_checkpoint
from diffsynth_dagster.training.modules import (
    add_lora,
    checkpoint_gradients,
    fingerprints,
    train_fully,
)
from diffsynth_dagster.training.optimizer import make_optimizer, make_schedule
from diffsynth_dagster.training.record import RunRecord
from diffsynth_dagster.training.reporting import Reporter, StepMetrics
from diffsynth_dagster.training.sampling import Sampler, grid
from diffsynth_dagster.training.step import TrainingStep
from diffsynth_dagster.weights.models import Models, store_in_float8


@dataclass
class Session:
    """Everything that a training works with."""

    config: TrainingConfig
    accelerator: Accelerator
    models: Models
    manifest: Manifest
    samples: Samples
    record: RunRecord
    reporter: Reporter
    stop_asked: Callable[[], bool]


def build_step(session: Session) -> TrainingStep:
    """Load the components of the step and make them trainable.

    Raises:
        WeightsError, TargetError, ParameterError: see `Models`, `add_lora`, `checkpoint_gradients`.
    """
    config, models = session.config, session.models
    family, trained = models.found.family, trained_components(config)
    loaded = models.get(step_components(models.found, trained))
    tokenizers = {n: loaded.pop(n) for n in list(loaded) if n in models.found.tokenizers}
    changed = {family.part(name).of for name in trained}
    if config.lora_base_model is not None:
        owner = family.part(config.lora_base_model).of
        add_lora(config, family, loaded[owner])
        if owner in models.found.float8:
            store_in_float8(loaded[owner], models.dtype, models.device)
    # DeepSpeed holds float32 copies of what is trained itself, in pieces.
    partitioned = session.accelerator.distributed_type == DistributedType.DEEPSPEED
    for name in config.trainable_models:
        part = family.part(name)
        train_fully(loaded[part.of], part, models.dtype if partitioned else torch.float32)
    asked = config.checkpoints_gradients
    if family.checkpoints_gradients if asked is None else asked:
        # Gradients of what conditions the denoiser go through all of it.
        for name in sorted(changed | {family.denoiser}):
            checkpoint_gradients(loaded[name], required=asked is not None)
    for name in changed:
        loaded[name].train()
    count = len(family.path().sigmas)
    low, high = config.min_timestep_boundary * count, config.max_timestep_boundary * count
    return TrainingStep(
        family, loaded, tokenizers, trained, config.seed, (int(low), int(high)), config.distills
    )


def train(session: Session) -> RunRecord:
    """Train to the end of the last epoch; returns the finished record.

    Raises:
        Stopped: the run was asked to stop.
        TrainingError: the loss is not finite.
        UserError: see `build_step`.
    """
    config, accelerator, record = session.config, session.accelerator, session.record
    step_module = build_step(session)
    trainable = {n: p for n, p in step_module.named_parameters() if p.requires_grad}
    marks = fingerprints(trainable.items())
    optimizer = make_optimizer(config, trainable.values())
    data = StepDataset(
        config,
        session.models.found.family,
        session.samples,
        accelerator.process_index,
        accelerator.num_processes,
    )
    epoch_steps = data.order.steps_per_epoch
    total = epoch_steps * config.num_epochs
    schedule = make_schedule(config, optimizer, total)
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        _tell_deepspeed(accelerator, config)
    model, optimizer = accelerator.prepare(step_module, optimizer)
    pictures = Pictures(session, accelerator.unwrap_model(model))
    pictures.samples(0)
    pictures.evaluate("before")

    session.reporter.started(total, config)
    started = time.perf_counter()
    offload = config.use_gradient_checkpointing_offload
    loader = DataLoader(
        data, batch_size=None, sampler=range(total), num_workers=config.dataset_num_workers
    )
    for step, batches in enumerate(loader, start=1):
        if session.stop_asked():
            raise Stopped
        began = time.perf_counter()
        loss = torch.zeros((), device=accelerator.device)
        for index, batch in enumerate(batches):
            accelerator.sync_gradients = index == len(batches) - 1
            with _no_sync(accelerator, model), _saved_tensors(offload, accelerator.device):
                weighted = _forward(model, batch.to(accelerator.device)).sum() * batch.scale
                accelerator.backward(weighted)
            loss += weighted.detach()
        norm = _clip(accelerator, trainable.values(), config.max_grad_norm)
        learning_rate = optimizer.param_groups[0]["lr"]
        optimizer.step()
        optimizer.zero_grad()
        if not accelerator.optimizer_step_was_skipped:
            schedule.step()
        metrics = StepMetrics(
            step=step,
            epoch=(step - 1) // epoch_steps,
            loss=_mean_over_processes(accelerator, loss),
            learning_rate=learning_rate,
            grad_norm=norm,
            seconds=time.perf_counter() - began,
            samples=_samples(batches),
        )
        session.reporter.stepped(metrics)
        _note(record, metrics, accelerator.optimizer_step_was_skipped)
        name = _due(config, step, epoch_steps, total)
        if name is not None:
            _save(session, model, frozenset(trainable), name, step)
            pictures.samples(step)

    record.seconds = time.perf_counter() - started
    record.steps = total
    record.samples_per_second = data.order.samples_per_epoch * config.num_epochs / record.seconds
    record.peak_memory_bytes = _peak_memory(accelerator.device)
    after = fingerprints(trainable.items())
    record.trained_tensors = len(marks)
    record.changed_tensors = sum(marks[name] != after[name] for name in marks)
    pictures.evaluate("after")
    record.finished = True
    return record


def _tell_deepspeed(accelerator: Accelerator, config: TrainingConfig) -> None:
    """What it would ask a data loader for, and the clipping, which it does itself."""
    plugin: Any = accelerator.state.deepspeed_plugin
    settings = plugin.deepspeed_config
    settings["train_micro_batch_size_per_gpu"] = config.batch_size
    if config.customized_optimizer is not None:
        # Or it would be replaced by DeepSpeed's own where its state lies in CPU memory.
        settings["zero_force_ds_cpu_optimizer"] = False
    if config.max_grad_norm is not None:
        settings["gradient_clipping"] = config.max_grad_norm
    elif settings.get("gradient_clipping", "auto") == "auto":
        settings["gradient_clipping"] = 0.0  # accelerate would clip at 1


def _forward(model: Any, batch: Batch) -> torch.Tensor:
    """Losses of a batch (B,); what DDP says about parameters without a gradient, in our words."""
    try:
        return model(batch)
    except RuntimeError as error:
        if "find_unused_parameters" not in str(error):
            raise
        raise ParameterError(
            "some trained parameters get no gradient, which several processes must be told",
            where="find_unused_parameters",
            do="give find_unused_parameters",
        ) from error


def _mean_over_processes(accelerator: Accelerator, value: torch.Tensor) -> float:
    reduced: Any = accelerator.reduce(value, "mean")
    return float(reduced)


def _samples(batches: list[Batch]) -> int:
    return sum(len(batch.samples) for batch in batches if batch.scale)


def _no_sync(accelerator: Accelerator, model: Any) -> AbstractContextManager[Any]:
    return nullcontext() if accelerator.sync_gradients else accelerator.no_sync(model)


def _saved_tensors(offload: bool, device: torch.device) -> AbstractContextManager[Any]:
    """Keep what the backward pass needs in CPU memory, if asked."""
    if not offload:
        return nullcontext()
    return torch.autograd.graph.save_on_cpu(pin_memory=device.type == "cuda")


def _clip(
    accelerator: Accelerator, parameters: Iterable[torch.Tensor], norm: float | None
) -> float:
    """Clip the gradients if asked; returns their norm before."""
    before = accelerator.clip_grad_norm_(parameters, float("inf") if norm is None else norm)
    return 0.0 if before is None else float(before)


def _note(record: RunRecord, metrics: StepMetrics, skipped: bool) -> None:
    """Take a step into the record.

    Args:
        skipped: the weights did not change, because float16 was too small for the gradients.

    Raises:
        TrainingError: the loss is not finite, or the gradients that changed the weights were not.
    """
    if not math.isfinite(metrics.loss) or not (skipped or math.isfinite(metrics.grad_norm)):
        record.all_losses_finite = False
        raise TrainingError(
            f"the training went astray in step {metrics.step}: the loss is {metrics.loss:g}, and "
            f"the norm of its gradient {metrics.grad_norm:g}",
            where=f"learning_rate = {metrics.learning_rate:g}",
            do="give a smaller learning_rate, or max_grad_norm; checkpoints written before are sound",
        )
    if record.first_loss is None:
        record.first_loss = metrics.loss
    record.final_loss = metrics.loss


def _due(config: TrainingConfig, step: int, epoch_steps: int, total: int) -> str | None:
    """Name of the checkpoint that is due after a step. The last step always leaves one."""
    if config.save_steps is None:
        return f"epoch-{step // epoch_steps - 1}" if step % epoch_steps == 0 else None
    return f"step-{step}" if step % config.save_steps == 0 or step == total else None


def _save(session: Session, model: Any, trainable: frozenset[str], name: str, step: int) -> None:
    """Write the trained weights, prefix stripped. Raises `OutputError`."""
    accelerator, config = session.accelerator, session.config
    parameters = dict(accelerator.unwrap_model(model).named_parameters())
    if accelerator.is_main_process:
        family = session.models.found.family
        state = trained_state(parameters, trainable, family, session.record.trained)
        tensors = strip_prefix(state, config.remove_prefix_in_ckpt)
        path = Path(config.output_path) / f"{name}.safetensors"
        provenance = {**session.record.provenance, "step": step}
        write_checkpoint(path, tensors, provenance)
        session.record.checkpoints[path.name] = digest_file(path)
        session.reporter.saved(step, path)
    accelerator.wait_for_everyone()


def _peak_memory(device: torch.device) -> int:
    """Most memory used so far: of the GPU, or of the process on a CPU. Bytes."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class Pictures:
    """Sample images and evaluations, made on the main process."""

    def __init__(self, session: Session, step_module: TrainingStep) -> None:
        self._session = session
        self._module = step_module
        self._sampler = Sampler(
            session.config,
            session.manifest,
            session.models,
            lambda: session.accelerator.autocast(),
        )
        self._folder = Path(session.config.output_path) / "samples"

    def samples(self, step: int) -> None:
        """One image for each of `sample_prompts`, as one picture."""
        prompts = self._session.config.sample_prompts
        if prompts and self._session.accelerator.is_main_process:
            images = self._generate(prompts, self._session.config.seed)
            picture = self._write(f"step-{step}", grid(images, columns=min(8, len(images))))
            self._session.reporter.sampled(step, picture)
        self._session.accelerator.wait_for_everyone()

    def evaluate(self, when: str) -> None:
        """Call `customized_evaluation` and keep what it found under `when`."""
        dotted = self._session.config.customized_evaluation
        if dotted is not None and self._session.accelerator.is_main_process:
            found = import_dotted(dotted, "customized_evaluation")(self._generate)
            record = self._session.record
            record.evaluation |= {f"{when}/{name}": v for name, v in found.metrics.items()}
            for name, picture in found.pictures.items():
                self._write(f"{when}-{name}", picture)
        self._session.accelerator.wait_for_everyone()

    def _generate(self, prompts: Any, seed: int) -> list[Image.Image]:
        modes = {module: module.training for module in self._module.modules()}
        self._module.eval()
        try:
            return self._sampler(self._module.loaded, prompts, seed)
        finally:
            for module, mode in modes.items():
                module.training = mode

    def _write(self, name: str, picture: Image.Image) -> Path:
        path = self._folder / f"{name}.png"
        write_whole(path, lambda staged: picture.save(staged, format="PNG"))
        self._session.record.pictures[name] = path.name
        return path
