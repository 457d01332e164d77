"""The modules of Qwen-Image and its editing variants: their files and their settings.

Modules come from diffusers and transformers. The published single files already carry diffusers'
tensor names, but for the text encoder's older ones.
"""

from diffusers import QwenImageTransformer2DModel

from diffsynth_dagster.families.contract import Component, Settings, Shapes
from diffsynth_dagster.families.shared.architecture import joint_transformer_settings
from diffsynth_dagster.families.shared.packing import PATCH
from diffsynth_dagster.families.shared.qwen_vl import QWEN_VL
from diffsynth_dagster.families.shared.wan_vae import QWEN_VAE


def dit_settings(shapes: Shapes) -> Settings:
    """The transformer."""
    return {
        **joint_transformer_settings(shapes, "img_in", "txt_in"),
        "patch_size": PATCH,
        "out_channels": shapes["proj_out.weight"][0] // PATCH**2,
    }


COMPONENTS = (
    Component(
        "dit",
        "transformer",
        (("txt_norm.weight", "txt_in.weight", "transformer_blocks.0.attn.add_q_proj.weight"),),
        QwenImageTransformer2DModel,
        dit_settings,
    ),
    QWEN_VL,
    QWEN_VAE,
)
