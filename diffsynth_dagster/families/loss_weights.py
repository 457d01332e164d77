"""Stages that read a sample's weight in the loss, and a mask of its parts, from the row."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch
from torch.nn import functional

from diffsynth_dagster.config.parameters import TrainingConfig
from diffsynth_dagster.data.columns import Input
from diffsynth_dagster.data.table.validate import BOOKKEEPING
from diffsynth_dagster.errors import ParameterError
from diffsynth_dagster.families.contract import Family, Loaded, Output, Sample, Stage, Tensors

_RESERVED = (*BOOKKEEPING, "sample", "key", "tokens", "prompt", "caption")
"""Names of columns that tables and manifests use themselves."""


def with_counted(family: Family, config: TrainingConfig) -> Family:
    """The family with stages for `sample_weight_column` and `loss_mask_column`, if they are given.

    Raises:
        ParameterError: the column is already used for something else, or the family has no picture
            or video that can be masked.
    """
    for parameter in ("sample_weight_column", "loss_mask_column"):
        column: str | None = getattr(config, parameter)
        if column is None:
            continue
        # Our own columns may contain a colon, such as `image:digest`.
        if ":" in column or column in (*_RESERVED, *(item.column for item in family.inputs)):
            raise ParameterError(
                f"the column '{column}' is read as something else",
                where=parameter,
                do="give the column another name",
            )
        make = _weight_stage if parameter == "sample_weight_column" else _mask_stage
        family = replace(family, stages=(*family.stages, make(family, column)))
    return family


def _weight_stage(family: Family, column: str) -> Stage:
    number = Input(
        column,
        "number",
        pattern=r"^\s*\d{1,6}(?:\.\d*)?\s*$",
        wants="a number from 0 to 999999",
        weighs=True,
    )
    run = partial(_read_weights, column=column)
    return Stage("sample_weight", (number,), (), (Output("sample_weight", "weight"),), run)


def _read_weights(loaded: Loaded, samples: Sequence[Sample], column: str) -> list[Tensors]:
    return [{"sample_weight": torch.tensor(float(sample[column]))} for sample in samples]


def _mask_stage(family: Family, column: str) -> Stage:
    """The stage that masks the main target, which is encoded from the first file column.

    Raises:
        ParameterError: that column has neither pictures nor videos.
    """
    main = family.columns.files[0]
    encoders = [s for s in family.stages if main in s.reads and _target(s) is not None]
    if main.kind not in ("image", "video") or main.many or not encoders:
        raise ParameterError(
            f"{family.name} has no picture or video that a mask could apply to",
            where="loss_mask_column",
            do="leave it out",
        )
    target = _target(encoders[0])
    assert target is not None
    picture = Input(column, "image", same_size=True, optional=True, weighs=True)
    output = Output("loss_mask", "mask", of=target)
    run = partial(_read_masks, column=column, target=target)
    return Stage("loss_mask", (picture,), (), (output,), run, needs=(encoders[0].name,))


def _target(stage: Stage) -> str | None:
    """The target that a stage yields; None if it yields none."""
    return next((o.name for o in stage.yields if o.role == "target"), None)


def _read_masks(
    loaded: Loaded, samples: Sequence[Sample], column: str, target: str
) -> list[Tensors]:
    """Pictures (3, H, W) in [-1, 1] and latents (C, …, h, w) → `loss_mask` (1, …, 1, h, w).

    Each element is the mean grey, in [0, 1], of the pixels that its latent covers. A row without a
    picture gets a mask of ones.
    """
    masks: list[Tensors] = []
    for sample in samples:
        latents = sample[target]
        size = latents.shape[-2:]
        if sample[column] is None:
            mask = torch.ones(size)
        else:
            grey = (sample[column].mean(0) + 1.0) / 2.0
            # "area" averages all pixels of a latent; other modes would sample a few of them.
            mask = functional.interpolate(grey[None, None], size=tuple(size), mode="area")[0, 0]
        # One channel, and one frame for videos: broadcast over the latents.
        masks.append({"loss_mask": mask.view(*(1,) * (latents.ndim - 2), *size)})
    return masks
