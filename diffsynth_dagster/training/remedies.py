"""Suggests parameters to change so that a training takes less memory."""

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import Literal

import torch

from diffsynth_dagster.config.entries import float8_entries
from diffsynth_dagster.config.parameters import TrainingConfig
from diffsynth_dagster.data.geometry import clip_rule
from diffsynth_dagster.weights.models import Models

Part = Literal["activations", "weights", "optimizer"]
Moment = Literal[
    "while models were loaded",
    "while samples were encoded",
    "while samples were made",
    "in the training",
]


@dataclass(frozen=True)
class Remedy:
    """A parameter to change.

    Attributes:
        part: what it reduces. "optimizer" is the optimizer's state, the gradients and the average.
        said: the parameter and its new value, as in a recipe.
    """

    part: Part
    said: str


def remedies(config: TrainingConfig, models: Models, moment: Moment) -> list[Remedy]:
    """The remedies that help at a moment and are not used yet, the cheapest first.

    Only parameters that the config and its family accept are suggested.
    """
    found = [*_of_weights(config, models)]
    if moment == "while samples were encoded":
        # Encoding has no optimizer, and sampling has no batches of the training.
        found = [*_of_batches(config), *_of_sizes(config, models), *found]
    elif moment == "while samples were made":
        found = [*_of_samples(config), *_of_sizes(config, models), *found]
    elif moment == "in the training":
        found = [
            *_of_activations(config, models),
            *_of_sizes(config, models),
            *found,
            *_of_optimizer(config),
        ]
    return found


def _of_batches(config: TrainingConfig) -> Iterator[Remedy]:
    if config.batch_size > 1:
        # The largest divisor, so that each step keeps its samples.
        size = config.batch_size
        fewer = next(n for n in range(size // 2, 0, -1) if size % n == 0)
        steps = config.gradient_accumulation_steps * size // fewer
        yield Remedy(
            "activations", f"batch_size: {fewer} with gradient_accumulation_steps: {steps}"
        )


def _of_samples(config: TrainingConfig) -> Iterator[Remedy]:
    if len(config.sample_prompts) > 1:
        yield Remedy("activations", f"sample_prompts: fewer than {len(config.sample_prompts)}")
    if config.sample_table is not None:
        yield Remedy("activations", "sample_table: with fewer rows")


def _of_activations(config: TrainingConfig, models: Models) -> Iterator[Remedy]:
    asked, usual = config.checkpoints_gradients, models.resolved.family.checkpoints_gradients
    checkpoints = usual if asked is None else asked
    if not checkpoints:
        yield Remedy("activations", "use_gradient_checkpointing: true")
    yield from _of_batches(config)
    on_gpu = models.device.type == "cuda"
    # On a CPU, activations are in CPU memory anyway.
    if on_gpu and not config.use_gradient_checkpointing_offload:
        yield Remedy("activations", "use_gradient_checkpointing_offload: true")


def _of_sizes(config: TrainingConfig, models: Models) -> Iterator[Remedy]:
    family = models.resolved.family
    clip = clip_rule(config.num_frames, config.frame_rate, family.geometry, family.name)
    if clip is not None and clip.num_frames > clip.rule.smallest:
        # Half the frames, or the next length that the family allows.
        frames = clip.rule.longest(max(clip.rule.smallest, clip.num_frames // 2))
        yield Remedy("activations", f"num_frames: {frames}")
    if config.height is not None and config.width is not None:
        # Half of each side, rounded down to what the family allows.
        factor = family.geometry.side_factor
        height, width = (
            max(side // 2 // factor, 1) * factor for side in (config.height, config.width)
        )
        if (height, width) != (config.height, config.width):
            yield Remedy("activations", f"height: {height}, width: {width}")
    elif config.max_pixels // 2 >= family.geometry.side_factor**2:
        yield Remedy("activations", f"max_pixels: {config.max_pixels // 2}")


def _of_weights(config: TrainingConfig, models: Models) -> Iterator[Remedy]:
    if models.dtype == torch.float32:
        yield Remedy("weights", "mixed_precision: bf16")
    stored = {entry.text for entry in float8_entries(config)}
    family = models.resolved.family
    full = {family.part(name).of for name in config.trainable_models}
    lora = {family.part(name).of for name in config.lora_base_model}
    # These must not be in float8: weights that change, and those that a DoRA takes norms of.
    exact = full | lora if config.lora_method == "dora" else full
    components = models.resolved.components
    frozen = {
        name: sum(prod(info.shape) for info in files.header.values())
        for name, files in components.items()
        if name not in exact and files.entry.text not in stored
    }
    # Only loaded components take memory; before any is loaded, each of them may.
    loaded = {name: count for name, count in frozen.items() if name in models.modules} or frozen
    if loaded:
        largest = max(loaded, key=lambda name: loaded[name])
        yield Remedy("weights", f"fp8_models with {components[largest].entry.text} ('{largest}')")
    # Of several experts, all but one are idle; what is trained in full stays on the device.
    idle = len(family.at_work(frozenset(lora))) > 1 and not full
    on_gpu = models.device.type == "cuda"
    if on_gpu and idle and not config.offload_idle_denoiser:
        yield Remedy("weights", "offload_idle_denoiser: true")


def _of_optimizer(config: TrainingConfig) -> Iterator[Remedy]:
    # These have small states already.
    small = config.optimizer in ("adamw8bit", "adafactor")
    if config.customized_optimizer is None and not small:
        yield Remedy("optimizer", "optimizer: adamw8bit")
    if config.ema_sigma_rel is not None:
        yield Remedy("optimizer", "ema_sigma_rel: left out")
    if config.lora_base_model and config.lora_method != "oft" and config.lora_rank > 1:
        yield Remedy("optimizer", f"lora_rank: {config.lora_rank // 2}")
    if config.trainable_models:
        names = ", ".join(config.trainable_models)
        yield Remedy("optimizer", f"lora_base_model: {names} in place of trainable_models")
