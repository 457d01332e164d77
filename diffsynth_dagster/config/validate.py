"""Turns values by name into a `TrainingConfig`, or raises one error that says what is wrong.

Ranges and types are declared with each parameter. The checks here are about parameters that
contradict or need each other.
"""

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from diffsynth_dagster.config.other_names import other_name
from diffsynth_dagster.config.parameters import MARKS, TrainingConfig
from diffsynth_dagster.config.samples import check_samples
from diffsynth_dagster.config.unsupported import family_with, refuse_unsupported
from diffsynth_dagster.dotted import check_dotted
from diffsynth_dagster.errors import ParameterError, nearest, shown

Naming = Callable[[str], str]
_Model = TypeVar("_Model", bound=BaseModel)
TRACKERS = ("tensorboard", "wandb", "swanlab", "trackio", "mlflow")
"""Trackers with a parameter `enable_<name>_log`. All but the first also have `<name>_project`."""
Refuse = Callable[[str, str], ParameterError]
"""Makes the error of a check: (what is wrong, what to do) → error."""


def as_flag(name: str) -> str:
    """A parameter's name as it is written on the command line."""
    return f"--{name}"


def as_key(name: str) -> str:
    """A parameter's name as it is quoted in messages about a recipe."""
    return f"'{name}'"


def refuse_unknown(name: str, known: Mapping[str, Any], where: str, naming: Naming) -> None:
    """Raise a `ParameterError` for an unknown parameter, with a hint.

    The hint is the unsupported family that has the parameter, or our name for another trainer's
    parameter, or the most similar known name.

    Args:
        known: the names that are valid here.
        where: where the name comes from, for the message.
        naming: how a name is written there.
    """
    family = family_with(name)
    if family is not None:
        raise ParameterError(
            f"{naming(name)} is of the family '{family}', which is not supported yet",
            where=where,
            do=f"leave {naming(name)} out",
        )
    hint = other_name(name) or nearest(name, known)
    raise ParameterError(
        f"unknown parameter {naming(name)}" + (f"; {hint}" if hint else ""),
        where=where,
        do="see `python -m diffsynth_dagster.train --help` for every parameter",
    )


def read_config(values: Mapping[str, Any], where: str, naming: Naming = as_key) -> TrainingConfig:
    """Make a config from values and check it.

    Args:
        values: parameter name → value, as text or already of its type.
        where: where the values come from, for messages.
        naming: how a parameter's name is written there.

    Raises:
        ParameterError: a model is not supported, a name is unknown, a value is out of range,
            parameters contradict each other, or the feature of a parameter does not exist yet.
    """
    # First: a recipe for an unsupported model has unknown names as well, which would only distract.
    refuse_unsupported(values, where)
    fields = TrainingConfig.model_fields
    for name in values:
        if name not in fields:
            refuse_unknown(name, fields, where, naming)
    config = validated(TrainingConfig, values, where, naming)
    for name in fields:
        if MARKS[name].planned and _is_given(config, name):
            raise ParameterError(
                f"{naming(name)} is not supported yet",
                where=where,
                do=f"leave {naming(name)} out",
            )

    def refuse(what: str, do: str) -> ParameterError:
        return ParameterError(what, where=where, do=do)

    for name, path in named_code(config).items():
        check_dotted(path, f"{where}: {naming(name)}")
    course = (_check_course, _check_learning, _check_objective, _check_held_out)
    for check in (_check_data, _check_models, _check_lora, *course, check_samples, _check_needs):
        check(config, naming, refuse)
    return config


def named_code(config: TrainingConfig) -> dict[str, str]:
    """Parameter → dotted path, for the given parameters that name a user's function or class."""
    names = ("customized_dataset", "customized_optimizer", "customized_evaluation")
    given = {name: getattr(config, name) for name in names}
    return {name: path for name, path in given.items() if path is not None}


def validated(
    model: type[_Model], values: Mapping[str, Any], where: str, naming: Naming = as_key
) -> _Model:
    """An instance of a pydantic model from values by name. Raises `ParameterError`."""
    try:
        return model.model_validate(dict(values))
    except ValidationError as error:
        parameter_error = _as_parameter_error(error, where, naming)
    # Raised outside the `except` block, so that pydantic's error is not chained to it: its text
    # holds the values, which may be very long.
    raise parameter_error


def _as_parameter_error(error: ValidationError, where: str, naming: Naming) -> ParameterError:
    """One error with all problems that pydantic found."""
    problems: list[str] = []
    for detail in error.errors():
        name = str(detail["loc"][0]) if detail["loc"] else "?"
        message = detail["msg"].removeprefix("Value error, ")
        message = message[:1].lower() + message[1:]
        problem = f"{naming(name)} = {shown(detail['input'])}: {message}"
        # A parameter of several types has one detail for each type, which may read the same.
        if problem not in problems:
            problems.append(problem)
    return ParameterError("; ".join(problems), where=where, do="correct the value")


def _is_given(config: TrainingConfig, name: str) -> bool:
    """Whether a parameter differs from its default."""
    # Giving the default is like not giving it: both lead to the same config.
    return getattr(config, name) != TrainingConfig.model_fields[name].default


def _check_data(config: TrainingConfig, n: Naming, refuse: Refuse) -> None:
    """Check the data set and the size of its samples."""
    if (config.height is None) != (config.width is None):
        raise refuse(
            f"{n('height')} and {n('width')} go together",
            "give both for one fixed size, or leave both out for each image's own size",
        )
    if config.bucket_step is not None and config.height is not None:
        raise refuse(
            f"{n('bucket_step')} has no effect with {n('height')} and {n('width')}",
            f"leave {n('bucket_step')} out, or both sides",
        )
    if config.dataset_metadata_path is None and not config.trains_only:
        raise refuse(
            "no data set is named",
            f"give {n('dataset_base_path')}, its folder, and {n('dataset_metadata_path')}, the metadata "
            "table (csv, json, jsonl or parquet), where there is one",
        )
    if not config.dataset_base_path:
        raise refuse(f"{n('dataset_base_path')} is missing", "name the root folder of the data set")


def _check_models(config: TrainingConfig, n: Naming, refuse: Refuse) -> None:
    """Check that there are models, and that something is trained."""
    if not config.model_paths and not config.model_id_with_origin_paths:
        raise refuse(
            "no model is named",
            f"give {n('model_paths')} or {n('model_id_with_origin_paths')}",
        )
    for name in config.lora_base_model:
        if name in config.trainable_models:
            raise refuse(
                f"'{name}' is in {n('trainable_models')} and is {n('lora_base_model')} as well",
                "train a model in full or through a LoRA, not both",
            )
    if len(config.lora_base_model) > 1 and config.lora_checkpoint is not None:
        raise refuse(
            f"{n('lora_checkpoint')} is one LoRA, and {n('lora_base_model')} names several models",
            "start several LoRAs from nothing, or train one model",
        )
    if not config.encodes_only and not config.trainable_models and not config.lora_base_model:
        raise refuse(
            "nothing is trained",
            f"give {n('trainable_models')} or {n('lora_base_model')}",
        )
    # The file holds one model's weights, so it must be clear which model they are for.
    one_in_full = len(config.trainable_models) == 1 and not config.lora_base_model
    if config.resume_from_checkpoint is not None and config.trainable_models and not one_in_full:
        raise refuse(
            f"{n('resume_from_checkpoint')} holds one model, and more than one is trained",
            "train one model in full; a LoRA starts from `lora_checkpoint`, and a whole training "
            "that was stopped goes on by itself",
        )


_METHODS: Mapping[str, tuple[str, ...]] = {
    "use_rslora": ("lora", "dora"),
    "lora_rank": ("lora", "dora", "lokr"),
    "lora_alpha": ("lora", "dora", "lokr"),
    "lora_dropout": ("lora", "dora"),
    "lokr_decompose_factor": ("lokr",),
    "lokr_decompose_both": ("lokr",),
    "oft_block_size": ("oft",),
    "align_to_opensource_format": ("lora",),
    "checkpoint_format": ("lora",),
    "export_formats": ("lora",),
}
"""Parameter → the methods (`lora_method`) that use it."""


def _check_lora(config: TrainingConfig, n: Naming, refuse: Refuse) -> None:
    """Refuse parameters that the chosen `lora_method` does not use, and contradictory formats."""
    for name, methods in _METHODS.items():
        if _is_given(config, name) and config.lora_method not in methods:
            raise refuse(
                f"{n(name)} means nothing for {n('lora_method')} = {config.lora_method}",
                f"leave {n(name)} out, or give {n('lora_method')} as {' or '.join(methods)}",
            )
    if config.align_to_opensource_format and config.checkpoint_format not in (None, "kohya"):
        raise refuse(
            f"{n('align_to_opensource_format')} is {n('checkpoint_format')} = kohya, not "
            f"{config.checkpoint_format}",
            "leave one of them out",
        )
    if config.lora_base_model and not config.remove_prefix_in_ckpt:
        asked = "kohya" if config.align_to_opensource_format else config.checkpoint_format
        if asked not in (None, "guide"):
            raise refuse(
                f"{n('remove_prefix_in_ckpt')} is empty, which keeps the names of the guide, and "
                f"{n('checkpoint_format')} is {asked}",
                f"leave one of them out, or give {n('checkpoint_format')} as guide",
            )
    if config.lokr_decompose_factor == 0:
        raise refuse(
            f"{n('lokr_decompose_factor')} = 0 divides nothing",
            "give a divisor of the layers' widths, or leave it out",
        )


def _check_course(config: TrainingConfig, n: Naming, refuse: Refuse) -> None:
    """Check the length of the training, its timesteps, and trackers."""
    if config.max_train_steps is not None and _is_given(config, "num_epochs"):
        raise refuse(
            f"{n('num_epochs')} and {n('max_train_steps')} both say how long the training is",
            "leave one of them out",
        )
    # Compared as indices of a schedule of 1000 timesteps: fractions that are too close leave none.
    if int(config.min_timestep_boundary * 1000) >= int(config.max_timestep_boundary * 1000):
        raise refuse(
            f"{n('min_timestep_boundary')} = {config.min_timestep_boundary} leaves no timestep "
            f"below {n('max_timestep_boundary')} = {config.max_timestep_boundary}",
            "give fractions of the schedule, the smaller one first",
        )
    bounded = (config.min_timestep_boundary, config.max_timestep_boundary) != (0.0, 1.0)
    if bounded and config.distills:
        raise refuse(
            f"{n('min_timestep_boundary')} and {n('max_timestep_boundary')} have no effect on "
            "direct distillation, which samples over the whole schedule",
            "leave them out",
        )
    if config.use_gradient_checkpointing_offload and config.use_gradient_checkpointing is False:
        raise refuse(
            f"{n('use_gradient_checkpointing_offload')} is gradient checkpointing, which "
            f"{n('use_gradient_checkpointing')} switches off",
            "leave one of them out",
        )
    enabled = [name for name in TRACKERS if getattr(config, f"enable_{name}_log")]
    projects = {f"{name}_project" for name in enabled if name != "tensorboard"}
    # accelerate starts all trackers with a single project name.
    if len({getattr(config, name) for name in projects}) > 1:
        raise refuse(
            f"{' and '.join(n(name) for name in sorted(projects))} differ, and a run has one project",
            "give all the same name, or enable one of them",
        )


def _check_learning(config: TrainingConfig, n: Naming, refuse: Refuse) -> None:
    """Check the optimizer, its learning rates and the average of the weights."""
    if config.customized_optimizer is not None and config.optimizer != "adamw":
        raise refuse(
            f"{n('optimizer')} and {n('customized_optimizer')} both name an optimizer",
            "give one of them",
        )
    for argument, name in (("lr", "learning_rate"), ("weight_decay", "weight_decay")):
        if argument in config.optimizer_arguments:
            raise refuse(
                f"'{argument}' is in {n('optimizer_arguments')}, and {n(name)} says it",
                f"give {n(name)}",
            )
    trained = (*config.trainable_models, *config.lora_base_model)
    for name in config.learning_rates:
        if name not in trained and not config.encodes_only:
            hint = nearest(name, trained)
            raise refuse(
                f"{n('learning_rates')} names '{name}', which is not trained"
                + (f"; {hint}" if hint else ""),
                f"name what is trained: {', '.join(trained)}",
            )
    # Prodigy estimates the step size, and `learning_rate` is a factor of it: 1e-4, the default,
    # would train almost nothing.
    if config.optimizer == "prodigy" and (config.learning_rate < 0.01 or config.learning_rates):
        raise refuse(
            f"prodigy finds one learning rate by itself, which {n('learning_rate')} multiplies",
            f"give {n('learning_rate')} 1, and no {n('learning_rates')}",
        )
    if config.optimizer != "adamw_schedule_free":
        return
    if config.ema_sigma_rel is not None:
        raise refuse(
            f"adamw_schedule_free keeps an average by itself, and {n('ema_sigma_rel')} another one",
            "give one of them",
        )
    if config.lr_scheduler not in ("constant", "constant_with_warmup"):
        raise refuse(
            f"{n('lr_scheduler')} = {config.lr_scheduler} with adamw_schedule_free, whose average "
            "takes the place of such a course",
            f"leave {n('lr_scheduler')} out; {n('lr_warmup_steps')} may be given",
        )


def _check_objective(config: TrainingConfig, n: Naming, refuse: Refuse) -> None:
    """Check how timesteps and captions are drawn."""
    used_by = {"logit_mean": "logit_normal", "logit_std": "logit_normal", "mode_scale": "mode"}
    for name, sampling in used_by.items():
        if _is_given(config, name) and config.timestep_sampling != sampling:
            raise refuse(
                f"{n(name)} is of {n('timestep_sampling')} = {sampling}, which is "
                f"{config.timestep_sampling}",
                f"leave {n(name)} out, or give {sampling}",
            )
    drawn = ("timestep_sampling", "timestep_shift")
    given = [name for name in drawn if _is_given(config, name)]
    if given and config.distills:
        raise refuse(
            f"{n(given[0])} has no effect on direct distillation, which samples over the whole schedule",
            "leave it out",
        )
    changing_captions = ("caption_dropout_rate", "caption_lists", "shuffle_tags")
    given = [name for name in changing_captions if _is_given(config, name)]
    if given and config.distills:
        raise refuse(
            f"{n(given[0])} does not go with direct distillation: the teacher made each sample from one "
            "caption",
            "leave it out",
        )


def _check_held_out(config: TrainingConfig, n: Naming, refuse: Refuse) -> None:
    """Check which samples are held out, and the parameters that need held-out samples."""
    split = config.validation_split
    if config.validation_metadata_path is not None and split is not None:
        raise refuse(
            f"{n('validation_metadata_path')} and {n('validation_split')} both hold out samples",
            "leave one of them out",
        )
    if split is not None and split >= 1 and not split.is_integer():
        raise refuse(
            f"{n('validation_split')} = {split} is neither a fraction nor a number of samples",
            "give a number below 1, or a whole one",
        )
    others = ("validation_steps", "validation_timesteps", "keep_best", "early_stopping_patience")
    given = [name for name in others if _is_given(config, name)]
    if given and not config.holds_out:
        raise refuse(
            f"{n(given[0])} is given, and no samples are held out",
            f"give {n('validation_split')} or {n('validation_metadata_path')}, or leave it out",
        )


def _check_needs(config: TrainingConfig, n: Naming, refuse: Refuse) -> None:
    """Refuse a parameter that is given without the one that it needs (`Mark.needs`)."""
    for name, mark in MARKS.items():
        if mark.needs is not None and _is_given(config, name) and not _is_given(config, mark.needs):
            raise refuse(
                f"{n(name)} is given but no {n(mark.needs)}",
                f"give {n(mark.needs)}, or leave {n(name)} out",
            )
