"""Trainings that start from what was promoted last."""

from pathlib import Path

from diffsynth_dagster.config.parameters import TrainingConfig
from diffsynth_dagster.promoted import current_promoted


def start_of(config: TrainingConfig) -> str | None:
    """The parameter by which a training starts from a checkpoint of its own kind; None where none is for
    what it trains: several models have several files."""
    if len(config.lora_base_model) + len(config.trainable_models) != 1:
        return None
    return "lora_checkpoint" if config.lora_base_model else "resume_from_checkpoint"


def with_warm_start(config: TrainingConfig) -> TrainingConfig:
    """The config of a training that starts from the promoted version of its run folder, instead of where it
    would; unchanged where there is none.

    Raises:
        OutputError: see `current_promoted`.
    """
    current, parameter = current_promoted(Path(config.output_path)), start_of(config)
    if current is None or parameter is None:
        return config
    # Its own folder, not the link: another version may be promoted before the training is done.
    (checkpoint,) = current.checkpoint_files
    return config.model_copy(update={parameter: str(checkpoint)})
