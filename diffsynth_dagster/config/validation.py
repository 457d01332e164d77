"""Samples that are held out, and what their loss decides."""

from pydantic import BaseModel

from diffsynth_dagster.config.kinds import parameter


class ValidationParameters(BaseModel):
    """Samples that are held out, and what their loss decides."""

    validation_metadata_path: str | None = parameter(
        None,
        "Metadata table of samples that are held out: with the columns of the data set's, and files "
        "under dataset_base_path.",
        affects="rows",
        by_content=True,
        off_by_default=True,
    )
    validation_split: float | None = parameter(
        None,
        "Samples of the data set that are held out: below 1 a fraction of them, else their number. "
        "Which ones follows from their content, so that they stay the same when others are added.",
        affects="training",
        off_by_default=True,
        gt=0.0,
    )
    validation_steps: int | None = parameter(
        None,
        "Optimizer steps between two measurements of the held-out loss; left out, one comes with each "
        "checkpoint. The first is made before the training.",
        affects="training",
        off_by_default=True,
        ge=1,
    )
    validation_timesteps: int = parameter(
        4,
        "Timesteps at which each held-out sample is measured: one in each of so many equal ranges of "
        "the schedule.",
        affects="training",
        off_by_default=True,
        ge=1,
        le=1000,
    )
    keep_best: bool = parameter(
        False,
        "Keep the weights with the smallest held-out loss too, in best-step-N.safetensors, and export "
        "these.",
        affects="training",
        off_by_default=True,
    )
    early_stopping_patience: int | None = parameter(
        None,
        "End the training when the held-out loss was not smaller than before so many times.",
        affects="training",
        off_by_default=True,
        ge=1,
    )

    @property
    def holds_out(self) -> bool:
        """Whether samples are held out."""
        return self.validation_metadata_path is not None or self.validation_split is not None
