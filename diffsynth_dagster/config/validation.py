"""Held-out samples: which they are, when their loss is measured, and what it decides."""

from pydantic import BaseModel

from diffsynth_dagster.config.declare import parameter


class ValidationParameters(BaseModel):
    """Held-out samples, and what their loss decides."""

    validation_metadata_path: str | None = parameter(
        None,
        "Metadata table of held-out samples, with the same columns as the data set's table, and files "
        "under dataset_base_path.",
        affects="rows",
        by_content=True,
        off_by_default=True,
    )
    # Affects training, not rows: the table is the same, only fewer of its rows are trained on.
    validation_split: float | None = parameter(
        None,
        "How many samples of the data set are held out: below 1 a fraction, else a number. They are "
        "chosen by their content, so that they stay the same when others are added.",
        affects="training",
        off_by_default=True,
        gt=0.0,
    )
    validation_steps: int | None = parameter(
        None,
        "Optimizer steps between two measurements of the held-out loss. Left out: one with each "
        "checkpoint. The first measurement is made before the training.",
        affects="training",
        off_by_default=True,
        ge=1,
    )
    validation_timesteps: int = parameter(
        4,
        "Number of timesteps at which each held-out sample is measured: one in each of as many equal "
        "ranges of the schedule.",
        affects="training",
        off_by_default=True,
        ge=1,
        le=1000,
    )
    keep_best: bool = parameter(
        False,
        "Also keep the weights with the smallest held-out loss, in best-step-N.safetensors, and export "
        "these.",
        affects="training",
        off_by_default=True,
    )
    early_stopping_patience: int | None = parameter(
        None,
        "End the training after this many measurements in a row in which the held-out loss reached no "
        "new minimum.",
        affects="training",
        off_by_default=True,
        ge=1,
    )

    @property
    def holds_out(self) -> bool:
        """Whether samples are held out."""
        return self.validation_metadata_path is not None or self.validation_split is not None
