"""All parameters of a training in one class.

The command-line flags, the keys of a recipe and the Dagster run config are derived from its fields:
name, type, default, range, description and effect are written nowhere else. The names are those of
the DiffSynth-Studio training guide. Other parameters have the names usual in the field.
"""

from collections.abc import Iterable
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, PrivateAttr, model_validator

from diffsynth_dagster.config.dataset import DatasetParameters, SizeParameters
from diffsynth_dagster.config.declare import is_text, mark_of, marks_of
from diffsynth_dagster.config.family_specific import FamilySpecificParameters
from diffsynth_dagster.config.learning import LearningParameters
from diffsynth_dagster.config.models import LoraParameters, ModelParameters
from diffsynth_dagster.config.objective import ObjectiveParameters
from diffsynth_dagster.config.output import OutputParameters
from diffsynth_dagster.config.samples import SamplingParameters
from diffsynth_dagster.config.training import GradientParameters, TrainingParameters
from diffsynth_dagster.config.validation import ValidationParameters


class TrainingConfig(
    DatasetParameters,
    ModelParameters,
    FamilySpecificParameters,
    TrainingParameters,
    ObjectiveParameters,
    LearningParameters,
    LoraParameters,
    GradientParameters,
    SizeParameters,
    OutputParameters,
    SamplingParameters,
    ValidationParameters,
):
    """All parameters of one training, flat. Made by `read_config`, which checks them together."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    # Not a parameter, so it is neither written to files nor part of any digest.
    _encoded_stages: frozenset[str] = PrivateAttr(frozenset())

    @model_validator(mode="before")
    @classmethod
    def _completed(cls, values: dict[str, Any]) -> dict[str, Any]:
        """Values before validation: an empty text becomes None where None is allowed, and a data
        set without a table gets its folder as the table."""
        fields = cls.model_fields
        left_out = {n for n, v in values.items() if v == "" and n in fields and is_text(fields[n])}
        values = {name: None if name in left_out else value for name, value in values.items()}
        # Not for the second half of split training: its folder holds encoded samples.
        base, is_encoded = (
            values.get("dataset_base_path"),
            str(values.get("task")).endswith(":train"),
        )
        if values.get("dataset_metadata_path") is None and base and not is_encoded:
            values["dataset_metadata_path"] = base
        return values

    def sets(self, name: str) -> bool:
        """Whether a parameter differs from its default, and from its `Mark.left_out_as`."""
        field, value = type(self).model_fields[name], getattr(self, name)
        means_none = mark_of(name, field).left_out_as
        return value != field.default and (means_none is None or value != means_none)

    @property
    def checkpoints_gradients(self) -> bool | None:
        """Whether to use gradient checkpointing, offloaded or not; None: the family's default."""
        return self.use_gradient_checkpointing_offload or self.use_gradient_checkpointing

    @property
    def writes_states(self) -> bool:
        """Whether the training writes states from which it can be resumed."""
        return self.state_steps is not None or self.state_minutes > 0

    @property
    def distills(self) -> bool:
        """Whether the task is direct distillation."""
        return self.task.startswith("direct_distill")

    @property
    def encodes_only(self) -> bool:
        """Whether nothing is trained: the first half of split training."""
        return self.task.endswith(":data_process")

    @property
    def trains_only(self) -> bool:
        """Whether nothing is encoded: the second half of split training."""
        return self.task.endswith(":train")

    @property
    def reads_encoded(self) -> bool:
        """Whether the data set is a folder with encoded samples, so that no metadata is read."""
        return self.trains_only and self.dataset_metadata_path is None

    @property
    def encoded_stages(self) -> frozenset[str]:
        """Second half of split training: stages that are already encoded. Empty until the data set
        has been looked at; see `with_encoded`."""
        return self._encoded_stages

    def with_encoded(self, stages: Iterable[str]) -> Self:
        """A copy of the config that notes which stages its data set has encoded."""
        config = self.model_copy()
        config._encoded_stages = frozenset(stages)
        return config

    @property
    def alpha(self) -> float:
        """The LoRA's alpha for a scale of alpha / rank, which every tool expects in a file.

        Rank-stabilised LoRA (Kalajdzievski 2023, arXiv:2312.03732) has the scale alpha /
        sqrt(rank). Its alpha is multiplied by sqrt(rank) here, which gives the same scale.
        """
        alpha = float(self.lora_rank) if self.lora_alpha is None else self.lora_alpha
        return alpha * self.lora_rank**0.5 if self.use_rslora else alpha

    @property
    def adapter(self) -> dict[str, Any]:
        """The adapter's settings as they are written into files: all that the tensors do not show.

        The names are peft's, except `method` (left out for a plain LoRA), `rank` and `alpha`.
        """
        scale = {"rank": self.lora_rank, "alpha": self.alpha}
        match self.lora_method:
            case "lora":
                return scale
            case "dora":
                return {"method": "dora", **scale}
            case "lokr":
                factors = {
                    "decompose_factor": self.lokr_decompose_factor,
                    "decompose_both": self.lokr_decompose_both,
                }
                return {"method": "lokr", **scale, **factors}
            case "oft":
                # Cayley: R = (1 + Q)(1 - Q)^-1 is a rotation for a skew-symmetric Q. peft computes
                # the inverse with five terms of the Neumann series.
                series = {"use_cayley_neumann": True, "num_cayley_neumann_terms": 5}
                return {"method": "oft", "oft_block_size": self.oft_block_size, **series}


GROUPS: tuple[type[BaseModel], ...] = (
    DatasetParameters,
    ModelParameters,
    FamilySpecificParameters,
    TrainingParameters,
    ObjectiveParameters,
    LearningParameters,
    LoraParameters,
    GradientParameters,
    SizeParameters,
    OutputParameters,
    SamplingParameters,
    ValidationParameters,
)

MARKS = marks_of(TrainingConfig)
"""Parameter name → what it affects; see `config.declare.Mark`."""
