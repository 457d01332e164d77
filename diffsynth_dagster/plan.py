"""What a training would do, told before a weight is loaded: the answer to `--dry_run`."""

from typing import Any

from diffsynth_dagster.cache.encode import trained_components
from diffsynth_dagster.config.parameters import TrainingConfig
from diffsynth_dagster.data.geometry import clip_rule, size_rule
from diffsynth_dagster.data.metadata import check_columns
from diffsynth_dagster.dotted import import_dotted
from diffsynth_dagster.families.contract import Family
from diffsynth_dagster.training.checkpoint import check_prefix
from diffsynth_dagster.training.modules import check_trainable
from diffsynth_dagster.weights.entries import model_entries
from diffsynth_dagster.weights.identify import guess_component, guess_family


def check_plan(config: TrainingConfig, family: Family) -> None:
    """Everything about a config that can be checked without a file.

    Raises:
        ParameterError: a parameter does not fit the family.
    """
    check_trainable(config, family)
    if config.customized_optimizer is not None:
        import_dotted(config.customized_optimizer, "customized_optimizer")
    check_prefix(config.remove_prefix_in_ckpt, trained_components(config))
    size_rule(config.height, config.width, config.max_pixels, family.geometry, config.bucket_step)
    clip_rule(config.num_frames, config.frame_rate, family.geometry, family.name)
    check_columns(config, family)


def make_plan(config: TrainingConfig) -> dict[str, Any]:
    """The plan of a config as JSON values. Needs no file, loads no weight.

    Raises:
        ParameterError: see `check_plan`; or the family cannot be told without the files.
    """
    family = guess_family(config)
    check_plan(config, family)
    trained = trained_components(config)
    entries = model_entries(config)
    sources = {
        guess_component(entry, family) or f"told when the file is there ({index})": entry.text
        for index, entry in enumerate(entries)
    }
    for tokenizer in family.tokenizers:
        given = getattr(config, tokenizer.parameter)
        sources[tokenizer.name] = given or f"beside the model files, or {tokenizer.default}"
    lora = None
    if config.lora_base_model is not None:
        targets = config.lora_target_modules
        if targets is None:
            targets = family.lora_targets.get(config.lora_base_model, ())
        lora = {
            "base_model": config.lora_base_model,
            "target_modules": list(targets) or "automatic",
            "rank": config.lora_rank,
            "alpha": config.alpha,
        }
    size: Any = {"max_pixels": config.max_pixels, "side_factor": family.geometry.side_factor}
    if config.bucket_step is not None:
        size["bucket_step"] = config.bucket_step
    if config.height is not None:
        size = {"height": config.height, "width": config.width}
    clip = clip_rule(config.num_frames, config.frame_rate, family.geometry, family.name)
    if clip is not None:
        size |= {"num_frames": clip.num_frames, "frame_rate": clip.frame_rate}
    file = "epoch-{n}" if config.save_steps is None else "step-{n}"
    return {
        "family": family.name,
        "task": config.task,
        "components": sources,
        "trained": {"full": list(config.trainable_models), "lora": lora},
        "stages": {
            "cached": [stage.name for stage in family.cached_stages(trained)],
            "in_step": [stage.name for stage in family.step_stages(trained)],
        },
        "geometry": size,
        "objective": family.path().description,
        "batch": {
            "batch_size": config.batch_size,
            "gradient_accumulation_steps": config.gradient_accumulation_steps,
        },
        "optimizer": config.customized_optimizer or "torch.optim.AdamW",
        "outputs": {
            "folder": config.output_path,
            "checkpoints": f"{file}.safetensors",
            "every": config.save_steps or "epoch",
            "removed_prefix": config.remove_prefix_in_ckpt,
        },
        "store": config.cache_path,
    }
