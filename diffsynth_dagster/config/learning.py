"""The optimizer and its learning rates, and the average of the weights."""

from typing import Annotated, Any, Literal, cast

from pydantic import BaseModel, BeforeValidator, Field

from diffsynth_dagster.config.declare import parameter
from diffsynth_dagster.config.pairs import read_pairs

Optimizer = Literal[
    "adamw", "adamw_fused", "adamw8bit", "adafactor", "prodigy", "muon", "adamw_schedule_free"
]
_Rate = Annotated[float, Field(gt=0.0, le=1000.0, allow_inf_nan=False)]
Arguments = Annotated[dict[str, Any], BeforeValidator(read_pairs)]
Rates = Annotated[dict[str, _Rate], BeforeValidator(read_pairs)]


class LearningParameters(BaseModel):
    """The optimizer, and which weights are kept."""

    optimizer: Optimizer = parameter(
        "adamw",
        "Optimizer by name. adamw8bit keeps its state in 8 bits, adafactor keeps almost none; prodigy "
        "finds the learning rate by itself (give learning_rate: 1); muon trains matrices, with AdamW for "
        "all other weights; adamw_schedule_free needs no learning rate schedule.",
        affects="training",
        off_by_default=True,
    )
    optimizer_arguments: Arguments = parameter(
        cast(dict[str, Any], {}),
        "Further arguments of the optimizer, as JSON or as name=value separated by blanks, such as "
        "betas=0.9,0.99 eps=1e-6.",
        affects="training",
        off_by_default=True,
    )
    learning_rates: Rates = parameter(
        cast(dict[str, float], {}),
        "Learning rates of single trained models, as JSON or as name=value separated by blanks, such "
        "as dit=1e-4 text_encoder=1e-5. The others have learning_rate.",
        affects="training",
        off_by_default=True,
    )
    ema_sigma_rel: float | None = parameter(
        None,
        "Keep an average of the trained weights over the steps, and save it and sample from it instead "
        "of the weights themselves. The value is σ_rel of Karras et al. 2024, the relative width of the "
        "average, such as 0.1.",
        affects="training",
        off_by_default=True,
        ge=0.001,
        lt=0.2886,  # 1/√12, the width of a plain mean of all steps (γ = 0)
    )
