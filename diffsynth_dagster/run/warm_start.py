"""Warm starts: trainings that begin with the promoted version of their run folder."""

from pathlib import Path

from diffsynth_dagster.config.parameters import TrainingConfig
from diffsynth_dagster.promoted import current_promoted


def start_of(config: TrainingConfig) -> str | None:
    """The parameter that names a checkpoint to start from, for what a config trains; None if it
    trains several models: their checkpoint has several files, and a parameter names one."""
    if len(config.lora_base_model) + len(config.trainable_models) != 1:
        return None
    return "lora_checkpoint" if config.lora_base_model else "resume_from_checkpoint"


def with_warm_start(config: TrainingConfig) -> TrainingConfig:
    """Change a config so that its training starts from the promoted version of its run folder. The
    config is returned unchanged if nothing was promoted.

    Raises:
        OutputError: see `current_promoted`.
    """
    current, parameter = current_promoted(Path(config.output_path)), start_of(config)
    if current is None or parameter is None:
        return config
    # Its own folder, not the link: another version may be promoted before the training is done.
    (checkpoint,) = current.checkpoint_files
    return config.model_copy(update={parameter: str(checkpoint)})
