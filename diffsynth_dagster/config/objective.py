"""What a visit of a sample is drawn from, and what counts in its loss."""

from typing import Annotated, Literal

from pydantic import BaseModel, Field

from diffsynth_dagster.config.kinds import parameter

Shift = Literal["resolution"] | Annotated[float, Field(gt=0.0, le=1000.0)]


class ObjectiveParameters(BaseModel):
    """What a visit of a sample is drawn from, and what counts in its loss."""

    timestep_sampling: Literal["uniform", "logit_normal", "mode"] = parameter(
        "uniform",
        "How timesteps are drawn from the schedule (Esser et al. 2024): uniform; logit_normal, more in "
        "the middle; mode, with heavy tails.",
        affects="training",
        off_by_default=True,
    )
    logit_mean: float = parameter(
        0.0,
        "Of logit_normal: mean of the logit of the timestep; above 0 draws more noise.",
        affects="training",
        needs="timestep_sampling",
        off_by_default=True,
        ge=-20.0,
        le=20.0,
    )
    logit_std: float = parameter(
        1.0,
        "Of logit_normal: standard deviation of the logit of the timestep.",
        affects="training",
        needs="timestep_sampling",
        off_by_default=True,
        gt=0.0,
        le=20.0,
    )
    mode_scale: float = parameter(
        1.29,
        "Of mode: above 0 draws more timesteps from the middle, below 0 from both ends.",
        affects="training",
        needs="timestep_sampling",
        off_by_default=True,
        ge=-1.0,
        le=1.75,
    )
    timestep_shift: Shift | None = parameter(
        None,
        "Which sigmas are drawn: a number is a shift in the place of the family's own; resolution keeps "
        "that for samples of the family's usual size, and multiplies it for others by the square root "
        "of their part of its pixels. Left out: the family's own.",
        affects="training",
        off_by_default=True,
    )
    # Latents: the empty caption is encoded beside the others.
    caption_dropout_rate: float = parameter(
        0.0,
        "How often a visit of a sample is told the empty caption in the place of its own, from 0 to 1.",
        affects="latents",
        off_by_default=True,
        ge=0.0,
        le=1.0,
    )
    caption_lists: bool = parameter(
        False,
        "A cell of the caption column may hold a list of captions (in csv as JSON), one of which each "
        "visit of the sample is told.",
        affects="rows",
        off_by_default=True,
    )
    # Latents: each order is encoded. The orders follow from the caption alone; the seed says which visit
    # is told which.
    shuffle_tags: bool = parameter(
        False,
        "Captions are tags separated by commas: each visit of a sample is told them in one of several "
        "orders.",
        affects="latents",
        off_by_default=True,
    )
    keep_tags: int = parameter(
        0,
        "Of shuffle_tags: how many tags stay first. caption_prefix stays before them.",
        affects="latents",
        needs="shuffle_tags",
        off_by_default=True,
        ge=0,
    )
    tag_orders: int = parameter(
        8,
        "Of shuffle_tags: how many orders of a caption are encoded, the written one among them.",
        affects="latents",
        needs="shuffle_tags",
        off_by_default=True,
        ge=2,
        le=1000,
    )
    sample_weight_column: str | None = parameter(
        None,
        "Column of numbers, 0 or more, that the losses of the rows are multiplied by: such as 0.5 for "
        "regularisation pictures, and 1 for the others.",
        affects="rows",
        off_by_default=True,
    )
    loss_mask_column: str | None = parameter(
        None,
        "Column of pictures that say where the loss of a row counts: where they are white, not where "
        "they are black, and grey in between. Everywhere where a cell is empty.",
        affects="rows",
        off_by_default=True,
    )
