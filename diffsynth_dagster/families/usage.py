"""A family as one config uses it."""

from collections.abc import Mapping
from dataclasses import replace

from diffsynth_dagster.config.parameters import TrainingConfig
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
