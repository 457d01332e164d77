"""ControlNets for UNets (Zhang et al. 2023, arXiv:2302.05543): the column `controlnet_image`."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from diffsynth_dagster.config.parameters import TrainingConfig
from diffsynth_dagster.data.columns import Input
from diffsynth_dagster.families.contract import (
    Family,
    Loaded,
    Output,
    Sample,
    Shapes,
    Stage,
    Tensors,
)
from diffsynth_dagster.families.requirements import (
    Refusal,
    column_and_model,
    models_differ,
    refused_model,
)
from diffsynth_dagster.families.shared.unet import cross_attention

COLUMN = "controlnet_image"
_UNION = ("control_add_embedding.", "task_embedding")
"""Prefixes of tensors that only unions of several ControlNets have."""


def control_refusals(name: str, told_sizes: bool) -> tuple[Refusal, ...]:
    """Refuse a ControlNet without its column, the column without a ControlNet, and ControlNets that
    are not supported.

    Args:
        name: name of the trained model, for messages.
        told_sizes: whether its UNet reads the sizes of the picture, as SDXL's does.
    """
    return (
        *column_and_model(COLUMN, "controlnet", "ControlNet"),
        refused_model(
            "controlnet",
            lambda shapes: any(n.startswith(_UNION) for n in shapes),
            "the ControlNet is a union of several, which is not supported",
            "give a ControlNet for one kind of image",
        ),
        refused_model(
            "controlnet",
            lambda shapes: shapes["controlnet_cond_embedding.conv_in.weight"][1] != 3,
            "the ControlNet reads more than an image (an inpainting one, with a mask), which is "
            "not supported",
            "give one that reads an image alone",
        ),
        refused_model(
            "controlnet",
            lambda shapes: ("add_embedding.linear_1.weight" in shapes) != told_sizes,
            f"the ControlNet is not one for {name}",
            f"give a ControlNet for {name}",
        ),
        models_differ(
            ("unet", cross_attention),
            ("controlnet", cross_attention),
            "embeddings of the prompt of one width",
        ),
    )


def _encode(loaded: Loaded, samples: Sequence[Sample]) -> list[Tensors]:
    """`controlnet_image` (3, H, W) in [-1, 1] → `control` (3, H, W) uint8 in [0, 255]."""
    # Cached as bytes: a quarter of float32, and exact, because the image had 8 bits.
    return [{"control": ((s[COLUMN] + 1.0) * 127.5).round().to(torch.uint8)} for s in samples]


_STAGE = Stage(
    "control",
    (Input(COLUMN, "image", same_size=True),),
    (),
    (Output("control", "condition"),),
    _encode,
)


def with_control(family: Family, config: TrainingConfig, given: Mapping[str, Shapes]) -> Family:
    """The family with the stage of the control image, if `extra_inputs` lists it: see
    `Family.variant`."""
    if COLUMN not in config.extra_inputs:
        return family
    return replace(family, stages=(*family.stages, _STAGE))


def residuals(
    loaded: Loaded, conditions: Tensors, x_t: torch.Tensor, **more: Any
) -> dict[str, Any]:
    """The residuals that a ControlNet adds inside the UNet, as arguments of the UNet's call.

    Empty without a control image.

    Args:
        x_t: noisy latents (B, C, H/8, W/8).
        more: the other arguments of the UNet.
    """
    if "control" not in conditions:
        return {}
    image = conditions["control"].to(x_t.dtype) / 255.0  # ControlNets read images in [0, 1]
    down, middle = loaded["controlnet"](x_t, controlnet_cond=image, return_dict=False, **more)
    return {"down_block_additional_residuals": down, "mid_block_additional_residual": middle}
