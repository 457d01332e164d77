"""What a training would do, found out before a weight is loaded: the first half of the answer to
`--dry_run`, and all of it with `--no_files`. (The other half is `training.dry_run`.)"""

from pathlib import Path
from typing import Any

from diffsynth_dagster.cache.manifest import FILE_NAME
from diffsynth_dagster.cache.split import with_settled
from diffsynth_dagster.config.entries import (
    float8_entries,
    model_entries,
    named_entries,
    start_entries,
)
from diffsynth_dagster.config.parameters import TrainingConfig
from diffsynth_dagster.config.particular import ParticularParameters
from diffsynth_dagster.data.geometry import clip_rule, size_rule
from diffsynth_dagster.data.table.check import check_columns
from diffsynth_dagster.dotted import import_function
from diffsynth_dagster.errors import ParameterError
from diffsynth_dagster.families.contract import Family
from diffsynth_dagster.families.making import guidance_of
from diffsynth_dagster.training.checkpoint import check_prefix
from diffsynth_dagster.training.modules import lora_target_names
from diffsynth_dagster.training.optimizer import OPTIMIZERS, check_optimizer
from diffsynth_dagster.training.overlap import refuse_overlap
from diffsynth_dagster.weights.hub import require_listed
from diffsynth_dagster.weights.identify import guess_model
from diffsynth_dagster.weights.recognise import guess_components
from diffsynth_dagster.weights.resolved import ResolvedModel


def check_plan(config: TrainingConfig, model: ResolvedModel) -> None:
    """Everything about a config that can be checked without a file.

    Raises:
        ParameterError: a parameter does not fit the family.
    """
    family = model.family
    check_particular(config, family)
    _check_denoisers(config, model)
    _check_samples(config, family)
    check_optimizer(config, model)
    float8_entries(config)
    if config.customized_evaluation is not None:
        import_function(config.customized_evaluation, "customized_evaluation", "generate")
    check_prefix(config.remove_prefix_in_ckpt, family, model.trained)
    _check_size(config)
    size_rule(config.height, config.width, config.max_pixels, family.geometry, config.bucket_step)
    clip_rule(config.num_frames, config.frame_rate, family.geometry, family.name)
    check_columns(config, family.columns)


def _check_denoisers(config: TrainingConfig, model: ResolvedModel) -> None:
    """Check how denoisers share the schedule.

    Raises:
        ParameterError: what is asked for makes no sense here.
    """
    shares = model.schedule.shares
    if not config.offload_idle_denoiser:
        return
    if len(shares) < 2:
        raise ParameterError(
            "no denoiser is ever idle: one alone is at work here",
            where="offload_idle_denoiser",
            do="leave it out, or train both experts",
        )
    full = [share.component for share in shares if share.component in config.trainable_models]
    if full:
        raise ParameterError(
            f"'{full[0]}' is trained in full, and weights that are trained stay on the device",
            where="offload_idle_denoiser",
            do="leave it out, or train LoRAs",
        )


def _check_size(config: TrainingConfig) -> None:
    """Refuse `max_pixels` where it would change nothing.

    Raises:
        ParameterError: `height` and `width` are given, which fix the size of what is trained on.
    """
    default = TrainingConfig.model_fields["max_pixels"].default
    if config.height is not None and config.max_pixels != default:
        raise ParameterError(
            "max_pixels has no effect when height and width are given",
            where=f"max_pixels = {config.max_pixels}",
            do="leave max_pixels out, or both sides",
        )


def check_particular(config: TrainingConfig, family: Family) -> None:
    """Check that this family takes every particular parameter that is given.

    Raises:
        ParameterError: it does not take one.
    """
    for name in ParticularParameters.model_fields:
        if config.sets(name) and name not in family.parameters:
            raise ParameterError(
                f"{family.name} takes no {name}",
                where=name,
                do=f"leave it out; {family.name} takes {', '.join(family.parameters)}",
            )


def _check_samples(config: TrainingConfig, family: Family) -> None:
    if (config.sample_texts or config.customized_evaluation) and not family.samples_from_text:
        reads = (i for stage in family.sample_stages for i in stage.reads)
        needed = dict.fromkeys(i.column for i in reads if i.kind not in ("text", "sizes"))
        listed = ", ".join(needed)
        raise ParameterError(
            f"a prompt alone makes no sample here: the model also needs {listed}",
            where="sample_prompts" if config.sample_texts else "customized_evaluation",
            do=f"give a table with the columns prompt, {listed} as sample_prompts"
            if config.sample_texts
            else "leave it out",
        )
    guided = guidance_of(config, family.sampling).is_on
    if config.sample_negative_prompt is not None and not guided:
        raise ParameterError(
            "a negative prompt is what guidance leads away from, and samples are made without guidance",
            where="sample_negative_prompt",
            do="leave it out, or give a sample_cfg_scale above 1",
        )


def make_plan(config: TrainingConfig) -> dict[str, Any]:
    """The plan of a config as JSON values. Needs no file, loads no weight.

    Raises:
        WeightsError: some of the local model files that are named are there, and others are not.
        StoreError: the encoded data set is there and damaged.
        ParameterError: see `check_plan`, `refuse_overlap`; or the family cannot be recognised without the files.
    """
    if not config.reads_encoded or (Path(config.dataset_base_path) / FILE_NAME).is_file():
        config = with_settled(config)
    if config.customized_dataset is not None:
        import_function(config.customized_dataset, "customized_dataset", "dataset_base_path")
    require_listed([*named_entries(config), *start_entries(config)])
    model = guess_model(config)
    family = model.family
    check_plan(config, model)
    refuse_overlap(config)
    sources = _sources(config, family)
    stored = [entry.text for entry in float8_entries(config)]
    asked = config.checkpoints_gradients
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
    """Component or tokenizer → where its files are."""
    sources: dict[str, str] = {}
    entries = model_entries(config)
    for index, (entry, name) in enumerate(
        zip(entries, guess_components(entries, family), strict=True)
    ):
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
        "target_modules": targets if len(targets) > 1 else next(iter(targets.values())),
        **config.adapter,
    }


def _geometry(config: TrainingConfig, family: Family) -> dict[str, int | float | None]:
    """The sides in pixels, or what they follow from; for videos the frames as well."""
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
    if config.distills:
        return "direct distillation: the samples of a few steps against the teacher's"
    noising, shares = model.noising, model.schedule.shares
    worded = [
        f"timesteps {float(noising.timesteps[s.low]):.0f} to {float(noising.timesteps[s.high - 1]):.0f}"
        + (f" by {s.component}" if len(shares) > 1 else "")
        for s in shares
    ]
    whole = len(shares) == 1 and (shares[0].low, shares[0].high) == (0, len(noising.timesteps))
    described = noising.description
    if model.family.scheduler_marks:
        described += ", unless the scheduler published with the model says otherwise"
    described = described if whole else f"{described}; {', '.join(worded)}"
    if config.timestep_sampling != "uniform":
        described += f"; drawn by {config.timestep_sampling}"
    if config.timestep_shift is not None:
        described += f"; drawn with the shift {config.timestep_shift}"
    return described
