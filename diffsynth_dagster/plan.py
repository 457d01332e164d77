"""Describes what a training would do, from its config alone. Checks nothing: see `preflight`."""

from typing import Any

from diffsynth_dagster.config.entries import (
    float8_entries,
    model_entries,
)
from diffsynth_dagster.config.parameters import TrainingConfig
from diffsynth_dagster.data.geometry import clip_rule
from diffsynth_dagster.families.contract import Family
from diffsynth_dagster.training.lora_targets import lora_target_names
from diffsynth_dagster.training.optimizer import OPTIMIZERS
from diffsynth_dagster.weights.recognise import guess_components
from diffsynth_dagster.weights.resolved import ResolvedModel


def describe(config: TrainingConfig, model: ResolvedModel) -> dict[str, Any]:
    """Describe a training as JSON values.

    Args:
        model: see `weights.identify.guess_model`.
    """
    family = model.family
    sources = _sources(config, family)
    stored = [entry.text for entry in float8_entries(config)]
    asked = config.checkpoints_gradients
    # Without `save_steps`, each epoch leaves a checkpoint.
    file = "epoch-{n}" if config.save_steps is None else "step-{n}"
    return {
        "family": family.name,
        "task": config.task,
        "components": sources,
        "float8": [name for name, text in sources.items() if text in stored],
        "trained": {"full": list(config.trainable_models), "lora": _lora(config, family)},
        "starts_from": {
            "fused": config.preset_lora_path,
            "lora": config.lora_checkpoint,
            "weights": config.resume_from_checkpoint,
        },
        "stages": {
            "cached": [stage.name for stage in model.cached_stages],
            "in_step": [stage.name for stage in model.step_stages],
        },
        "geometry": _geometry(config, family),
        "objective": _objective(config, model),
        "batch": {
            "batch_size": config.batch_size,
            "gradient_accumulation_steps": config.gradient_accumulation_steps,
        },
        "gradient_checkpointing": family.checkpoints_gradients if asked is None else asked,
        "optimizer": config.customized_optimizer or OPTIMIZERS[config.optimizer].path,
        "outputs": {
            "folder": config.output_path,
            "checkpoints": f"{file}.safetensors",
            "every": config.save_steps or "epoch",
            "removed_prefix": config.remove_prefix_in_ckpt,
        },
        "store": config.cache_path,
    }


def _sources(config: TrainingConfig, family: Family) -> dict[str, str]:
    """Component or tokenizer → the entry of the config that names its files."""
    sources: dict[str, str] = {}
    entries = model_entries(config)
    for index, (entry, name) in enumerate(
        zip(entries, guess_components(entries, family), strict=True)
    ):
        # The name of a file may not tell its component; its tensors will.
        if name is None or name in sources:
            name = f"known when the file is there ({index})"
        sources[name] = entry.text
    for tokenizer in family.tokenizers:
        given = getattr(config, tokenizer.parameter)
        sources[tokenizer.name] = given or f"beside the model files, or {tokenizer.default}"
    return sources


def _lora(config: TrainingConfig, family: Family) -> dict[str, Any] | None:
    if not config.lora_base_model:
        return None
    targets = {
        base: list(lora_target_names(config, family, base)) or "automatic"
        for base in config.lora_base_model
    }
    return {
        "base_model": ", ".join(targets),
        # One component is shown without its name, as in a recipe.
        "target_modules": targets if len(targets) > 1 else next(iter(targets.values())),
        **config.adapter,
    }


def _geometry(config: TrainingConfig, family: Family) -> dict[str, int | float | None]:
    """The size in pixels, or the parameters that decide it; for videos, the frames too."""
    # The sides follow from these if they are not given.
    size: dict[str, int | float | None] = {
        "max_pixels": config.max_pixels,
        "side_factor": family.geometry.side_factor,
    }
    if config.bucket_step is not None:
        size["bucket_step"] = config.bucket_step
    if config.height is not None:
        size = {"height": config.height, "width": config.width}
    clip = clip_rule(config.num_frames, config.frame_rate, family.geometry, family.name)
    if clip is not None:
        size |= {"num_frames": clip.num_frames, "frame_rate": clip.frame_rate}
    return size


def _objective(config: TrainingConfig, model: ResolvedModel) -> str:
    """The noising, and which timesteps are trained, in words."""
    if config.distills:
        return "direct distillation: the samples of a few steps against the teacher's"
    noising, shares = model.noising, model.schedule.shares
    ranges = [
        f"timesteps {float(noising.timesteps[s.low]):.0f} to {float(noising.timesteps[s.high - 1]):.0f}"
        + (f" by {s.component}" if len(shares) > 1 else "")
        for s in shares
    ]
    # Only a part of the schedule, or several experts, is worth naming.
    whole = len(shares) == 1 and (shares[0].low, shares[0].high) == (0, len(noising.timesteps))
    described = noising.description
    # The config file of a scheduler is not looked at here.
    if model.family.scheduler_marks:
        described += ", unless the scheduler published with the model says otherwise"
    described = described if whole else f"{described}; {', '.join(ranges)}"
    if config.timestep_sampling != "uniform":
        described += f"; drawn by {config.timestep_sampling}"
    if config.timestep_shift is not None:
        described += f"; drawn with the shift {config.timestep_shift}"
    return described
