"""FLUX.1 with reference images (Kontext) or a ControlNet: the columns of `extra_inputs`."""

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
    ModelListed,
    ParameterSet,
    Refusal,
)

_KONTEXT, _CONTROL, _MODE = InputNamed(KONTEXT), InputNamed(CONTROL), InputNamed(MODE)
_NET = ModelListed("controlnet")
_UNION = ModelHas("controlnet", lambda shapes: "controlnet_mode_embedder.weight" in shapes)

REFUSALS = (
    Refusal(
        f"{CONTROL} is given but no ControlNet",
        "add its files to the model list",
        when=(_CONTROL,),
        unless=(_NET, ParameterSet("encodes_only")),
    ),
    Refusal(
        f"the model list has a ControlNet, but {CONTROL} is not given",
        f"name {CONTROL}",
        when=(_NET,),
        unless=(_CONTROL,),
    ),
    Refusal(
        f"{MODE} is given but not {CONTROL}",
        f"name {CONTROL} as well",
        when=(_MODE,),
        unless=(_CONTROL,),
    ),
    Refusal(
        f"{KONTEXT} and {CONTROL} do not go together",
        "name one of them",
        when=(_CONTROL, _KONTEXT),
    ),
    Refusal(
        "the ControlNet reads its image with layers of its own, which is not supported",
        "give one that reads latents, such as those of InstantX, Shakker Labs or Jasper",
        when=(ModelHas("controlnet", lambda s: any(n.startswith("input_hint_block.") for n in s)),),
    ),
    Refusal(
        "the transformer is given an image beside the noise (Fill, Depth, Canny), which is not "
        "supported",
        "give FLUX.1-dev, Krea-dev or Kontext-dev",
        when=(ModelHas("dit", lambda s: s["x_embedder.weight"][1] != s["proj_out.weight"][0]),),
    ),
    Refusal(
        "the ControlNet reads more than an image (an inpainting one, with a mask), which is "
        "not supported",
        "give one that reads an image alone",
        when=(
            ModelHas(
                "controlnet",
                lambda s: s["controlnet_x_embedder.weight"] != s["x_embedder.weight"],
            ),
        ),
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
UNION_STAGE = replace(
    CONTROL_STAGE,
    reads=(
        *CONTROL_STAGE.reads,
        Input(
            MODE,
            "text",
            pattern=rf"^\s*(?:{'|'.join(MODES)})\s*$",
            wants=f"one of {', '.join(MODES)}",
        ),
    ),
    yields=(*CONTROL_STAGE.yields, Output("control_mode", "condition")),
)


def variant(family: Family, config: TrainingConfig, given: Mapping[str, Shapes]) -> Family:
    """FLUX.1 with the stages of the columns that `extra_inputs` names."""
    stages = list(family.stages)
    if KONTEXT in config.extra_inputs:
        stages.append(KONTEXT_STAGE)
    if CONTROL in config.extra_inputs:
        stages.append(UNION_STAGE if MODE in config.extra_inputs else CONTROL_STAGE)
    return replace(family, stages=tuple(stages))
