"""How weights are changed, beside the usual settings of `course`, and which are kept."""

from typing import Annotated, Any, Literal, cast

from pydantic import BaseModel, BeforeValidator, Field

from diffsynth_dagster.config.kinds import parameter
from diffsynth_dagster.config.pairs import read_pairs

Optimizer = Literal[
    "adamw", "adamw_fused", "adamw8bit", "adafactor", "prodigy", "muon", "adamw_schedule_free"
]
_Rate = Annotated[float, Field(gt=0.0, le=1000.0, allow_inf_nan=False)]
Arguments = Annotated[dict[str, Any], BeforeValidator(read_pairs)]
Rates = Annotated[dict[str, _Rate], BeforeValidator(read_pairs)]


class LearningParameters(BaseModel):
    """How weights are changed, and which are kept."""

    optimizer: Optimizer = parameter(
        "adamw",
        "Optimizer by name. adamw8bit keeps its state in 8 bits, adafactor nearly none; prodigy finds "
        "the learning rate (learning_rate: 1); muon is for matrices, with AdamW for the others; "
        "adamw_schedule_free needs no course of the learning rate.",
        affects="training",
        off_by_default=True,
    )
    optimizer_arguments: Arguments = parameter(
        cast(dict[str, Any], {}),
        "Further arguments of the optimizer, as JSON or as name=value with blanks between, such as "
        "betas=0.9,0.99 eps=1e-6.",
        affects="training",
        off_by_default=True,
    )
    learning_rates: Rates = parameter(
        cast(dict[str, float], {}),
        "Learning rates of single trained models, as JSON or as name=value with blanks between, such "
        "as dit=1e-4 text_encoder=1e-5. The others have learning_rate.",
        affects="training",
        off_by_default=True,
    )
    ema_sigma_rel: float | None = parameter(
        None,
        "Keep an average of the trained weights over the steps, and save and show it in place of them: "
        "σ_rel of Karras et al. 2024, the width of its profile over the training, such as 0.1.",
        affects="training",
        off_by_default=True,
        ge=0.001,
        lt=0.2886,
    )
