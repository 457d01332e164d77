"""FLUX.1's components: how to recognise their files, and their settings from shapes."""

from diffusers import FluxControlNetModel, FluxTransformer2DModel

from diffsynth_dagster.families.contract import (
    Component,
    ComponentNames,
    Construction,
    Recognition,
    Settings,
    Shapes,
)
from diffsynth_dagster.families.flux.lora import TEXT_ENCODER, TRANSFORMER
from diffsynth_dagster.families.flux.names import NAMES, PREFIX
from diffsynth_dagster.families.shared.architecture import (
    count_blocks,
    joint_transformer_settings,
)
from diffsynth_dagster.families.shared.clip import clip_text_encoder
from diffsynth_dagster.families.shared.image_vae import image_vae
from diffsynth_dagster.families.shared.t5 import t5_encoder


def _transformer(shapes: Shapes) -> Settings:
    """The settings that the transformer and a ControlNet have in common."""
    return {
        **joint_transformer_settings(shapes, "x_embedder", "context_embedder"),
        "num_single_layers": count_blocks(shapes, "single_transformer_blocks."),
        "pooled_projection_dim": shapes["time_text_embed.text_embedder.linear_1.weight"][1],
        "guidance_embeds": "time_text_embed.guidance_embedder.linear_1.weight" in shapes,
    }


def dit_settings(shapes: Shapes) -> Settings:
    """The settings of the transformer."""
    return {**_transformer(shapes), "out_channels": shapes["proj_out.weight"][0]}


def controlnet_settings(shapes: Shapes) -> Settings:
    """The settings of a ControlNet. A union of several ControlNets has modes."""
    modes = shapes.get("controlnet_mode_embedder.weight")
    return {**_transformer(shapes), "num_mode": modes[0] if modes else None}


_BLOCK_0 = ("double_blocks.0.img_mod.lin.weight", "img_in.weight", "vector_in.in_layer.weight")
"""Tensor names that only the authors' layout of the transformer has."""

COMPONENTS = (
    Component(
        name="dit",
        recognition=Recognition(
            signatures=(
                (
                    "x_embedder.weight",
                    "context_embedder.weight",
                    "norm_out.linear.weight",
                    "transformer_blocks.0.norm1_context.linear.weight",
                ),
                # ComfyUI's files have a prefix before the authors' names.
                _BLOCK_0,
                tuple(PREFIX + name for name in _BLOCK_0),
            ),
            original_globs=("flux1-*.safetensors",),
        ),
        construction=Construction(
            kind=FluxTransformer2DModel, settings=dit_settings, convert=NAMES.converted
        ),
        names=ComponentNames(folder="transformer", lora=TRANSFORMER),
    ),
    clip_text_encoder(lora=TEXT_ENCODER),
    t5_encoder("text_encoder_2"),
    # Scale and shift as in the vae/config.json of FLUX.1-dev.
    image_vae(0.3611, 0.1159, original_globs=("ae.safetensors",), checkpoint_prefixes=()),
    Component(
        name="controlnet",
        recognition=Recognition(
            signatures=(("controlnet_x_embedder.weight", "controlnet_blocks.0.weight"),),
            # ControlNet repositories contain nothing else, so this general name is safe.
            original_globs=("diffusion_pytorch_model*.safetensors",),
        ),
        construction=Construction(
            kind=FluxControlNetModel,
            settings=controlnet_settings,
            # diffusers declares them for the transformer only.
            blocks=("FluxTransformerBlock", "FluxSingleTransformerBlock"),
        ),
        names=ComponentNames(folder="controlnet", prefix="pipe.controlnet.models.0."),
    ),
)
