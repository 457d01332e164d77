"""Which parameters have an effect on what is trained: what a training's identity is made of."""

from typing import Any

from diffsynth_dagster.config.parameters import TrainingConfig

WITHOUT_EFFECT = frozenset(
    {
        "cache_path",
        "dataset_base_path",
        "dataset_metadata_path",
        "dataset_num_workers",
        "enable_csv_log",
        "enable_swanlab_log",
        "enable_tensorboard_log",
        "enable_wandb_log",
        "family",
        "initialize_model_on_cpu",
        "model_id_with_origin_paths",
        "model_paths",
        "output_path",
        "processor_path",
        "swanlab_project",
        "tokenizer_1_path",
        "tokenizer_2_path",
        "tokenizer_path",
        "verify_content",
        "wandb_project",
    }
)
"""Parameters that say where things lie or how they are watched, and change nothing that is trained:
files count by their content."""

BY_CONTENT = frozenset({"fp8_models", "lora_checkpoint", "preset_lora_path"})
"""Parameters that name files whose content is part of the identity of a training."""


def named_values(config: TrainingConfig) -> dict[str, Any]:
    """Every parameter as a JSON value; the task without its half, which has no effect."""
    return config.model_dump(mode="json") | {"task": config.task.split(":")[0]}


def effect(config: TrainingConfig) -> dict[str, Any]:
    """The parameters that have an effect on what is trained, as JSON values."""
    return {n: v for n, v in named_values(config).items() if n not in WITHOUT_EFFECT}


def trained_components(config: TrainingConfig) -> frozenset[str]:
    """The components whose weights change: in full, or through a LoRA."""
    lora = {config.lora_base_model} if config.lora_base_model else set[str]()
    return frozenset({*config.trainable_models, *lora})


_ROWS = (
    "allow_outside_base_path",
    "bucket_step",
    "data_file_keys",
    "extra_inputs",
    "frame_rate",
    "height",
    "max_pixels",
    "metadata_encoding",
    "num_frames",
    "width",
)


def values_that_affect(config: TrainingConfig, *kinds: str) -> dict[str, Any]:
    values = named_values(config)
    return {name: values[name] for name in _ROWS if "rows" in kinds}


def settled_by_encoding(config: TrainingConfig) -> dict[str, Any]:
    from diffsynth_dagster.config.parameters import ENCODING

    return {name: value for name, value in named_values(config).items() if name in ENCODING}
