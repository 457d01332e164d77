"""A family as one config uses it."""

from collections.abc import Mapping
from dataclasses import replace

from diffsynth_dagster.config.parameters import TrainingConfig
from diffsynth_dagster.errors import ParameterError
from diffsynth_dagster.families.contract import Family, Shapes
from diffsynth_dagster.families.counted import with_counted
from diffsynth_dagster.families.requirements import Use, check_refusals
from diffsynth_dagster.families.teacher import with_teacher


def as_used(family: Family, config: TrainingConfig, given: Mapping[str, Shapes]) -> Family:
    """The family as a config uses it: with the stages, columns and architecture that it needs.

    Args:
        given: component → shapes of its tensors; empty shapes where the files are not there.

    Raises:
        ParameterError: the family refuses this combination of inputs, parameters and models.
    """
    check_refusals(family.refusals, Use(config, given))
    _check_open_format(family, config)
    if family.variant is not None:
        family = family.variant(family, config, given)
    if config.caption_lists:
        family = _with_caption_lists(family)
    family = with_counted(family, config)
    return with_teacher(family, config) if config.distills else family


def _with_caption_lists(family: Family) -> Family:
    """The family with a caption column that may hold lists."""
    stages = [
        replace(stage, reads=tuple(replace(i, many=i.many or i.caption) for i in stage.reads))
        for stage in family.stages
    ]
    return replace(family, stages=tuple(stages))


def _check_open_format(family: Family, config: TrainingConfig) -> None:
    """A LoRA that has no names in the open format cannot be written in it. Raises `ParameterError`."""
    if not config.align_to_opensource_format or not family.to_kohya:
        return
    for name in config.lora_base_model:
        if name not in family.to_kohya:
            raise ParameterError(
                f"the open format has no names for a LoRA of '{name}' here",
                where="align_to_opensource_format",
                do="leave it out: the export for diffusers is written anyway",
            )
