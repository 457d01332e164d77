"""FLUX.1 with reference images (Kontext) or a ControlNet, as `extra_inputs` asks."""

from collections.abc import Mapping
from dataclasses import replace

from diffsynth_dagster.config.parameters import TrainingConfig
from diffsynth_dagster.data.columns import Input
from diffsynth_dagster.families.contract import Family, Output, Shapes, Stage
from diffsynth_dagster.families.flux.stages import (
    CONTROL,
    KONTEXT,
    MODE,
    MODES,
    encode_control,
    encode_kontext,
)
from diffsynth_dagster.families.requirements import (
    InputNamed,
    ModelHas,
    Refusal,
    column_and_model,
    column_needs,
    columns_exclude,
    has_start,
    models_differ,
    refused_model,
)
from diffsynth_dagster.families.shared.image_vae import latent_channels

_NET = "controlnet"
_MODE, _UNION = InputNamed(MODE), ModelHas(_NET, has_start("controlnet_mode_embedder."))

REFUSALS = (
    *column_and_model(CONTROL, _NET, "ControlNet"),
    column_needs(MODE, CONTROL),
    columns_exclude(KONTEXT, CONTROL),
    refused_model(
        _NET,
        has_start("input_hint_block."),
        "the ControlNet reads its image with layers of its own, which is not supported",
        "give one that reads latents, such as those of InstantX, Shakker Labs or Jasper",
    ),
    refused_model(
        "dit",
        lambda shapes: shapes["x_embedder.weight"][1] != shapes["proj_out.weight"][0],
        "the transformer is given an image beside the noise (Fill, Depth, Canny), which is not "
        "supported",
        "give FLUX.1-dev, Krea-dev or Kontext-dev",
    ),
    refused_model(
        _NET,
        lambda shapes: shapes["controlnet_x_embedder.weight"] != shapes["x_embedder.weight"],
        "the ControlNet reads more than an image (an inpainting one, with a mask), which is "
        "not supported",
        "give one that reads an image alone",
    ),
    # A token of the transformer is a patch of 2x2 latents.
    models_differ(
        ("dit", lambda shapes: shapes["proj_out.weight"][0]),
        ("vae", lambda shapes: 4 * latent_channels(shapes)),
        "latents of as many channels",
    ),
    Refusal(
        f"the ControlNet is a union of several, and {MODE} is not given",
        f"name {MODE}",
        when=(_UNION,),
        unless=(_MODE,),
    ),
    Refusal(
        f"{MODE} is given, but the ControlNet has no modes",
        "leave it out",
        when=(_MODE,),
        unless=(_UNION,),
    ),
)

KONTEXT_STAGE = Stage(
    "kontext",
    (Input(KONTEXT, "image", many=True),),
    ("vae",),
    (Output("kontext", "condition"), Output("kontext_ids", "condition")),
    encode_kontext,
)
CONTROL_STAGE = Stage(
    "control",
    (Input(CONTROL, "image", same_size=True),),
    ("vae",),
    (Output("control", "condition"),),
    encode_control,
)
_MODE_NAME = Input(
    MODE,
    "text",
    pattern=rf"^\s*(?:{'|'.join(MODES)})\s*$",
    wants=f"one of {', '.join(MODES)}",
)
UNION_STAGE = replace(
    CONTROL_STAGE,
    reads=(*CONTROL_STAGE.reads, _MODE_NAME),
    yields=(*CONTROL_STAGE.yields, Output("control_mode", "condition")),
)


def variant(family: Family, config: TrainingConfig, given: Mapping[str, Shapes]) -> Family:
    """FLUX.1 with a stage for each column in `extra_inputs`."""
    stages = list(family.stages)
    if KONTEXT in config.extra_inputs:
        stages.append(KONTEXT_STAGE)
    if CONTROL in config.extra_inputs:
        stages.append(UNION_STAGE if MODE in config.extra_inputs else CONTROL_STAGE)
    return replace(family, stages=tuple(stages))
