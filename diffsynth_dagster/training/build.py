"""Builds the training step: loads the modules and changes them by one transform after another.

A new transform (compiling, offloading, sharding) is one function and one line in `TRANSFORMS`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from diffsynth_dagster.config.parameters import TrainingConfig
from diffsynth_dagster.families.contract import Part
from diffsynth_dagster.run.start import require_starts
from diffsynth_dagster.training.adapters import is_adapter
from diffsynth_dagster.training.expert_offload import keep_one_on_device
from diffsynth_dagster.training.gradient_checkpointing import checkpoint_gradients
from diffsynth_dagster.training.lora import add_lora
from diffsynth_dagster.training.step import TrainingStep
from diffsynth_dagster.weights.float8 import store_in_float8
from diffsynth_dagster.weights.models import Models
from diffsynth_dagster.weights.resolved import ResolvedModel
from diffsynth_dagster.weights.whole import load_weights


@dataclass(frozen=True)
class Building:
    """What a transform works on.

    Attributes:
        modules: component → its module. A transform changes modules in place.
        device, dtype: where the modules compute, and in which type.
        trained_dtype: element type of weights that are trained as a whole; a LoRA is float32.
    """

    config: TrainingConfig
    model: ResolvedModel
    modules: Mapping[str, nn.Module]
    device: torch.device
    dtype: torch.dtype
    trained_dtype: torch.dtype


def add_loras(building: Building) -> None:
    """Add LoRA layers to what `lora_base_model` names. Raises: see `lora.add_lora`."""
    config, family = building.config, building.model.family
    for base in config.lora_base_model:
        add_lora(config, family, building.modules[family.part(base).of], base)


def store_weights(building: Building) -> None:
    """Store the frozen weights of components with a LoRA in float8. (The other components were
    stored in float8 when they were loaded.)"""
    family = building.model.family
    # Two parts of a component may have LoRAs; the component is converted once.
    for owner in dict.fromkeys(family.part(base).of for base in building.config.lora_base_model):
        if building.model.is_float8(owner):
            store_in_float8(building.modules[owner], building.dtype, building.device)


def train_in_full(building: Building) -> None:
    """Make all weights of what `trainable_models` names trainable, and give them the values of
    `resume_from_checkpoint`.

    Raises:
        WeightsError: see `load_weights`.
    """
    config, family = building.config, building.model.family
    for name in config.trainable_models:
        part = family.part(name)
        module = building.modules[part.of]
        _make_trainable(module, part, building.trained_dtype)
        if config.resume_from_checkpoint is not None:
            path = Path(config.resume_from_checkpoint)
            where = f"resume_from_checkpoint = {path.absolute()}"
            load_weights(module, path, family, name, where)


def checkpoint_activations(building: Building) -> None:
    """Recompute activations in the backward pass, if the config asks for it or, when it says
    nothing, if the family usually does. Raises `ParameterError`: see `checkpoint_gradients`."""
    model, asked = building.model, building.config.checkpoints_gradients
    if model.family.checkpoints_gradients if asked is None else asked:
        # The gradients of a trained text encoder or ControlNet pass through the whole denoiser,
        # even if the denoiser itself is frozen.
        through = model.trained_components | {d.component for d in model.denoisers}
        for name in sorted(through):
            # A family's usual choice is not an error for a component that cannot do it.
            checkpoint_gradients(building.modules[name], required=asked is not None)


def set_training_mode(building: Building) -> None:
    """Put trained components into training mode. The others stay in evaluation mode."""
    for name in building.model.trained_components:
        building.modules[name].train()


def offload_idle_experts(building: Building) -> None:
    """Keep the frozen weights of idle experts in CPU memory, if the config asks for it."""
    if building.config.offload_idle_denoiser:
        experts = [building.modules[d.component] for d in building.model.denoisers]
        keep_one_on_device(experts, building.device)


Transform = Callable[[Building], None]

TRANSFORMS: tuple[Transform, ...] = (
    add_loras,
    # After the LoRA: DoRA takes norms of the exact weights, and peft would use the type of the
    # layer, float8, for its own weights.
    store_weights,
    train_in_full,
    checkpoint_activations,
    set_training_mode,
    # Last: only weights that are still frozen are offloaded.
    offload_idle_experts,
)
"""Applied in this order."""


def build_step(config: TrainingConfig, models: Models, trained_dtype: torch.dtype) -> TrainingStep:
    """Load the components of the step, apply the transforms, and return the training step.

    Args:
        trained_dtype: see `Building`.

    Raises:
        WeightsError, TargetError, ParameterError: see `Models` and the transforms.
    """
    model = models.resolved
    loaded = models.get(model.step_components)
    tokenizers = {name: loaded.pop(name) for name in list(loaded) if name in model.tokenizers}
    building = Building(config, model, loaded, models.device, models.dtype, trained_dtype)
    for transform in TRANSFORMS:
        transform(building)
    # Checked last: tensors may be mapped from their files until a transform copies them.
    require_starts(config, model)
    for name in model.step_components:
        model.require_unchanged(name)
    return TrainingStep(model, loaded, tokenizers, config)


def _make_trainable(module: nn.Module, part: Part, dtype: torch.dtype) -> None:
    """Make the parameters of a component or part trainable, converted to an element type."""
    for name, parameter in module.named_parameters():
        if part.holds(name) and not is_adapter(name):
            parameter.data = parameter.data.to(dtype)
            parameter.requires_grad_(True)
