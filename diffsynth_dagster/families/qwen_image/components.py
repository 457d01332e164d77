"""The components of Qwen-Image and its editing releases: how to recognise their files, and their
settings from shapes.

The published files already have diffusers' tensor names. Only the text encoder's are older names of
transformers, which `QWEN_VL` converts.
"""

from functools import partial

from diffusers import QwenImagePipeline, QwenImageTransformer2DModel

from diffsynth_dagster.families.contract import (
    Component,
    ComponentNames,
    Construction,
    Recognition,
    Settings,
    Shapes,
)
from diffsynth_dagster.families.lora import LoraRules
from diffsynth_dagster.families.shared.architecture import joint_transformer_settings
from diffsynth_dagster.families.shared.fused_names import AuthorsNames
from diffsynth_dagster.families.shared.packing import PATCH
from diffsynth_dagster.families.shared.pipeline import load_into_transformer
from diffsynth_dagster.families.shared.qwen_vl import QWEN_VL
from diffsynth_dagster.families.shared.wan_vae import QWEN_VAE

LORA_TARGETS = (
    "to_q,to_k,to_v,add_q_proj,add_k_proj,add_v_proj,to_out.0,to_add_out,"
    "img_mlp.net.2,img_mod.1,txt_mlp.net.2,txt_mod.1"
)
_BLOCK = (
    *("img_mod.1", "txt_mod.1", "attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"),
    *("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out"),
    *("img_mlp.net.0.proj", "img_mlp.net.2", "txt_mlp.net.0.proj", "txt_mlp.net.2"),
)
_OUTSIDE = (
    *("img_in", "txt_in", "norm_out.linear", "proj_out"),
    *(f"time_text_embed.timestep_embedder.linear_{n}" for n in (1, 2)),
)
NAMES = AuthorsNames(
    {"transformer_blocks": ("transformer_blocks", {name: (name,) for name in _BLOCK})},
    {name: name for name in _OUTSIDE},
)
"""The layer names: the authors' and diffusers' are the same."""


def dit_settings(shapes: Shapes) -> Settings:
    """The settings of the transformer."""
    return {
        **joint_transformer_settings(shapes, "img_in", "txt_in"),
        "patch_size": PATCH,
        "out_channels": shapes["proj_out.weight"][0] // PATCH**2,
    }


COMPONENTS = (
    Component(
        name="dit",
        recognition=Recognition(
            signatures=(
                ("txt_norm.weight", "txt_in.weight", "transformer_blocks.0.attn.add_q_proj.weight"),
            )
        ),
        construction=Construction(kind=QwenImageTransformer2DModel, settings=dit_settings),
        names=ComponentNames(
            folder="transformer",
            lora=LoraRules(
                "transformer",
                partial(load_into_transformer, QwenImagePipeline),
                targets=tuple(LORA_TARGETS.split(",")),
                authors=NAMES,
                read_by_comfyui=("comfyui", "kohya", "diffusers"),
            ),
        ),
    ),
    QWEN_VL,
    QWEN_VAE,
)
