"""How timesteps and captions are drawn for each visit of a sample, and what counts in its loss."""

from typing import Annotated, Literal

from pydantic import BaseModel, Field

from diffsynth_dagster.config.declare import parameter

Shift = Literal["resolution"] | Annotated[float, Field(gt=0.0, le=1000.0)]


class ObjectiveParameters(BaseModel):
    """How timesteps and captions are drawn, and what counts in the loss."""

    timestep_sampling: Literal["uniform", "logit_normal", "mode"] = parameter(
        "uniform",
        "How timesteps are drawn from the schedule (Esser et al. 2024): uniform; logit_normal: more from "
        "the middle; mode: with heavy tails, see mode_scale.",
        affects="training",
        off_by_default=True,
    )
    logit_mean: float = parameter(
        0.0,
        "For logit_normal: mean of the logit of the timestep; above 0 draws timesteps with more noise.",
        affects="training",
        needs="timestep_sampling",
        off_by_default=True,
        ge=-20.0,
        le=20.0,
    )
    logit_std: float = parameter(
        1.0,
        "For logit_normal: standard deviation of the logit of the timestep.",
        affects="training",
        needs="timestep_sampling",
        off_by_default=True,
        gt=0.0,
        le=20.0,
    )
    mode_scale: float = parameter(
        1.29,
        "For mode: above 0 draws more timesteps from the middle, below 0 from both ends.",
        affects="training",
        needs="timestep_sampling",
        off_by_default=True,
        ge=-1.0,
        le=1.75,
    )
    timestep_shift: Shift | None = parameter(
        None,
        "Shift of the sigmas that are drawn: a number replaces the family's own shift; resolution keeps "
        "the family's shift for samples of its usual size, and multiplies it for others by the square "
        "root of (pixels of the sample / pixels of the usual size). Left out: the family's own shift.",
        affects="training",
        off_by_default=True,
    )
    # Affects latents: the empty caption is encoded as well.
    caption_dropout_rate: float = parameter(
        0.0,
        "Probability, from 0 to 1, that a visit of a sample gets the empty caption instead of its own.",
        affects="latents",
        off_by_default=True,
        ge=0.0,
        le=1.0,
    )
    caption_lists: bool = parameter(
        False,
        "A cell of the caption column may hold a list of captions (in csv as JSON). Each visit of the "
        "sample uses one of them.",
        affects="rows",
        off_by_default=True,
    )
    # Affects latents: each order is encoded. The orders depend on the caption alone; the seed
    # decides which visit uses which.
    shuffle_tags: bool = parameter(
        False,
        "Captions are tags separated by commas: each visit of a sample uses one of several orders of "
        "them.",
        affects="latents",
        off_by_default=True,
    )
    keep_tags: int = parameter(
        0,
        "For shuffle_tags: how many of the first tags keep their place. caption_prefix stays before "
        "them.",
        affects="latents",
        needs="shuffle_tags",
        off_by_default=True,
        ge=0,
    )
    tag_orders: int = parameter(
        8,
        "For shuffle_tags: how many orders of a caption are encoded, including the written one.",
        affects="latents",
        needs="shuffle_tags",
        off_by_default=True,
        ge=2,
        le=1000,
    )
    sample_weight_column: str | None = parameter(
        None,
        "Column of numbers (0 or more) by which the losses of the rows are multiplied, such as 0.5 for "
        "regularisation pictures and 1 for the others.",
        affects="rows",
        off_by_default=True,
    )
    loss_mask_column: str | None = parameter(
        None,
        "Column of pictures that say where the loss of a row counts: fully where they are white, not "
        "where they are black, partly where they are grey. With an empty cell it counts everywhere.",
        affects="rows",
        off_by_default=True,
    )
