"""FLUX.1's modules: how their files are recognised, and built from a config or from shapes."""

from diffusers import AutoencoderKL, FluxControlNetModel, FluxTransformer2DModel
from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint
from transformers import CLIPTextModel

from diffsynth_dagster.families.contract import Component, Settings, Shapes, Tensors
from diffsynth_dagster.families.flux.names import NAMES, PREFIX
from diffsynth_dagster.families.shared.architecture import (
    clip_settings,
    count_blocks,
    joint_transformer_settings,
)
from diffsynth_dagster.families.shared.t5 import t5_encoder


def _transformer(shapes: Shapes) -> Settings:
    """What the transformer and a ControlNet have in common."""
    return {
        **joint_transformer_settings(shapes, "x_embedder", "context_embedder"),
        "num_single_layers": count_blocks(shapes, "single_transformer_blocks."),
        "pooled_projection_dim": shapes["time_text_embed.text_embedder.linear_1.weight"][1],
        "guidance_embeds": "time_text_embed.guidance_embedder.linear_1.weight" in shapes,
    }


def dit_settings(shapes: Shapes) -> Settings:
    """The transformer."""
    return {**_transformer(shapes), "out_channels": shapes["proj_out.weight"][0]}


def controlnet_settings(shapes: Shapes) -> Settings:
    """A ControlNet; with modes when it is a union of several."""
    modes = shapes.get("controlnet_mode_embedder.weight")
    return {**_transformer(shapes), "num_mode": modes[0] if modes else None}


def text_encoder_settings(shapes: Shapes) -> Settings:
    """CLIP's text tower. A head has the 64 channels of every published size."""
    return {
        **clip_settings(shapes, head=64),
        "vocab_size": shapes["embeddings.token_embedding.weight"][0],
        "max_position_embeddings": shapes["embeddings.position_embedding.weight"][0],
        "bos_token_id": 0,
        "eos_token_id": 2,  # as published: pools at the highest token
    }


def vae_settings(shapes: Shapes) -> Settings:
    """The image VAE. The scale and shift of the latents are the published ones."""
    levels = count_blocks(shapes, "encoder.down_blocks.")
    return {
        "in_channels": shapes["encoder.conv_in.weight"][1],
        "out_channels": shapes["decoder.conv_out.weight"][0],
        "down_block_types": ("DownEncoderBlock2D",) * levels,
        "up_block_types": ("UpDecoderBlock2D",) * levels,
        "block_out_channels": tuple(
            shapes[f"encoder.down_blocks.{i}.resnets.0.conv1.weight"][0] for i in range(levels)
        ),
        "layers_per_block": count_blocks(shapes, "encoder.down_blocks.0.resnets."),
        "latent_channels": shapes["decoder.conv_in.weight"][1],
        "scaling_factor": 0.3611,
        "shift_factor": 0.1159,
        "use_quant_conv": "quant_conv.weight" in shapes,
        "use_post_quant_conv": "post_quant_conv.weight" in shapes,
    }


def convert_text_encoder(tensors: Tensors) -> Tensors:
    """The names of the published file (`text_model.…`) → those of transformers."""
    return {
        name.removeprefix("text_model."): tensor
        for name, tensor in tensors.items()
        if not name.endswith("embeddings.position_ids")
    }


def convert_vae(tensors: Tensors) -> Tensors:
    """The names of `ae.safetensors` → diffusers' names."""
    if "encoder.down.0.block.0.conv1.weight" not in tensors:
        return tensors
    levels = count_blocks(tensors, "encoder.down.")
    blocks = {"down_block_types": range(levels), "up_block_types": range(levels)}
    return convert_ldm_vae_checkpoint(tensors, blocks)


_BLOCK_0 = ("double_blocks.0.img_mod.lin.weight", "img_in.weight", "vector_in.in_layer.weight")

COMPONENTS = (
    Component(
        "dit",
        "transformer",
        (
            (
                "x_embedder.weight",
                "context_embedder.weight",
                "norm_out.linear.weight",
                "transformer_blocks.0.norm1_context.linear.weight",
            ),
            _BLOCK_0,
            tuple(PREFIX + name for name in _BLOCK_0),
        ),
        FluxTransformer2DModel,
        dit_settings,
        NAMES.converted,
        ("flux1-*.safetensors",),
    ),
    Component(
        "text_encoder",
        "text_encoder",
        tuple(
            (
                f"{start}embeddings.token_embedding.weight",
                f"{start}encoder.layers.0.self_attn.q_proj.weight",
                f"{start}final_layer_norm.weight",
            )
            for start in ("text_model.", "")
        ),
        CLIPTextModel,
        text_encoder_settings,
        convert_text_encoder,
    ),
    t5_encoder("text_encoder_2"),
    Component(
        "vae",
        "vae",
        (
            ("encoder.down_blocks.0.resnets.0.conv1.weight", "decoder.conv_norm_out.weight"),
            ("encoder.down.0.block.0.conv1.weight", "decoder.norm_out.weight"),
        ),
        AutoencoderKL,
        vae_settings,
        convert_vae,
        ("ae.safetensors",),
    ),
    Component(
        "controlnet",
        "controlnet",
        (("controlnet_x_embedder.weight", "controlnet_blocks.0.weight"),),
        FluxControlNetModel,
        controlnet_settings,
        # In repositories of their own, beside nothing else.
        origin=("diffusion_pytorch_model*.safetensors",),
        prefix="pipe.controlnet.models.0.",
    ),
)
