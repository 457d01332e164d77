"""Every parameter of a training, once: the groups together.

The command-line flags, the keys of a recipe and the Dagster run config are derived from these
fields: name, type, default, range, description and effect are written nowhere else. The names are
those of the DiffSynth-Studio training guide; parameters that the guide lacks carry the field's
usual names.
"""

from collections.abc import Iterable
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, PrivateAttr, model_validator

from diffsynth_dagster.config.course import GradientParameters, TrainingParameters
from diffsynth_dagster.config.dataset import DatasetParameters, SizeParameters
from diffsynth_dagster.config.kinds import is_text, mark_of, marks_of
from diffsynth_dagster.config.learning import LearningParameters
from diffsynth_dagster.config.models import LoraParameters, ModelParameters
from diffsynth_dagster.config.objective import ObjectiveParameters
from diffsynth_dagster.config.output import OutputParameters, SamplingParameters
from diffsynth_dagster.config.particular import ParticularParameters
from diffsynth_dagster.config.validation import ValidationParameters


class TrainingConfig(
    DatasetParameters,
    ModelParameters,
    ParticularParameters,
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
    """All parameters of one training, flat. Made by `read_config`, which checks what belongs
    together and words the errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    # No parameter: nothing that is written or compared by value holds it.
    _encoded_stages: frozenset[str] = PrivateAttr(frozenset())

    @model_validator(mode="before")
    @classmethod
    def _completed(cls, values: dict[str, Any]) -> dict[str, Any]:
        """An empty text leaves out a parameter that may be left out; a data set without a table is the
        folder itself."""
        fields = cls.model_fields
        left_out = {n for n, v in values.items() if v == "" and n in fields and is_text(fields[n])}
        values = {name: None if name in left_out else value for name, value in values.items()}
        # A folder is its own table, unless it holds what is encoded.
        base, is_encoded = (
            values.get("dataset_base_path"),
            str(values.get("task")).endswith(":train"),
        )
        if values.get("dataset_metadata_path") is None and base and not is_encoded:
            values["dataset_metadata_path"] = base
        return values

    def sets(self, name: str) -> bool:
        """Whether a parameter has another value than its default, or than what that stands for."""
        field, value = type(self).model_fields[name], getattr(self, name)
        means_none = mark_of(name, field).left_out_as
        return value != field.default and (means_none is None or value != means_none)

    @property
    def checkpoints_gradients(self) -> bool | None:
        """Whether activations are recomputed, wherever the kept ones lie; None: as usual."""
        return self.use_gradient_checkpointing_offload or self.use_gradient_checkpointing

    @property
    def writes_states(self) -> bool:
        """Whether a training leaves states that it can go on from."""
        return self.state_steps is not None or self.state_minutes > 0

    @property
    def distills(self) -> bool:
        """Whether the loss is that of direct distillation."""
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
        """Whether the data set is a folder that the first half wrote, and no metadata is read."""
        return self.trains_only and self.dataset_metadata_path is None

    @property
    def encoded_stages(self) -> frozenset[str]:
        """The stages that the data set of a second half has encoded, as far as it was looked at."""
        return self._encoded_stages

    def with_encoded(self, stages: Iterable[str]) -> Self:
        """The config of a second half whose data set has these stages encoded."""
        config = self.model_copy()
        config._encoded_stages = frozenset(stages)
        return config

    @property
    def alpha(self) -> float:
        """The LoRA's alpha: the update is scaled by alpha / rank, whatever it was given as.

        That of rank-stabilised LoRA (Kalajdzievski 2023, arXiv:2312.03732), which is scaled by
        alpha / sqrt(rank), is brought to this form, in which every tool reads it.
        """
        alpha = float(self.lora_rank) if self.lora_alpha is None else self.lora_alpha
        return alpha * self.lora_rank**0.5 if self.use_rslora else alpha

    @property
    def adapter(self) -> dict[str, Any]:
        """What is trained in the layers, as files say it: all that the tensors in them do not tell.

        The names are peft's but for `method` (left out for a plain LoRA), `rank` and `alpha`.
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
                # R = (1 + Q)(1 - Q)^-1, its inverse by five terms of Neumann's series.
                series = {"use_cayley_neumann": True, "num_cayley_neumann_terms": 5}
                return {"method": "oft", "oft_block_size": self.oft_block_size, **series}


GROUPS: tuple[type[BaseModel], ...] = (
    DatasetParameters,
    ModelParameters,
    ParticularParameters,
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
"""Parameter name → what it affects; see `config.kinds.Mark`."""
