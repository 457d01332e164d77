"""FLUX.1's modules: how their files are recognised, and built from a config or from shapes."""

from collections.abc import Mapping
from typing import Any

from diffusers import AutoencoderKL, FluxControlNetModel, FluxTransformer2DModel
from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from diffsynth_dagster.families.contract import Component, Shapes, Tensors
from diffsynth_dagster.families.flux.names import PREFIX, to_diffusers
from diffsynth_dagster.families.shared.support import count_blocks, from_config, t5_settings


def _architecture(shapes: Shapes) -> dict[str, Any]:
    """What a transformer and a ControlNet have in common. The rotary axes take the published
    shares of a head: 1/8 for the first, 7/16 for each side."""
    head = shapes["transformer_blocks.0.attn.norm_q.weight"][0]
    inner, in_channels = shapes["x_embedder.weight"]
    side = (head - head // 8) // 2
    return {
        "in_channels": in_channels,
        "num_layers": count_blocks(shapes, "transformer_blocks."),
        "num_single_layers": count_blocks(shapes, "single_transformer_blocks."),
        "attention_head_dim": head,
        "num_attention_heads": inner // head,
        "joint_attention_dim": shapes["context_embedder.weight"][1],
        "pooled_projection_dim": shapes["time_text_embed.text_embedder.linear_1.weight"][1],
        "guidance_embeds": "time_text_embed.guidance_embedder.linear_1.weight" in shapes,
        "axes_dims_rope": (head // 8, side, side),
    }


def build_dit(shapes: Shapes, config: Mapping[str, Any] | None) -> nn.Module:
    """The transformer."""
    if config is not None:
        return from_config(FluxTransformer2DModel, config)
    out_channels = shapes["proj_out.weight"][0]
    return FluxTransformer2DModel(**_architecture(shapes), out_channels=out_channels)


def build_controlnet(shapes: Shapes, config: Mapping[str, Any] | None) -> nn.Module:
    """A ControlNet; with modes when it is a union of several."""
    if config is not None:
        return from_config(FluxControlNetModel, config)
    modes: Any = shapes.get("controlnet_mode_embedder.weight", (None,))[0]
    return FluxControlNetModel(**_architecture(shapes), num_mode=modes)


def build_text_encoder(shapes: Shapes, config: Mapping[str, Any] | None) -> nn.Module:
    """CLIP's text tower. From shapes, a head has the 64 channels of every published size."""
    if config is not None:
        return CLIPTextModel(CLIPTextConfig.from_dict(dict(config)))
    vocabulary, hidden = shapes["embeddings.token_embedding.weight"]
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=vocabulary,
            hidden_size=hidden,
            intermediate_size=shapes["encoder.layers.0.mlp.fc1.weight"][0],
            num_hidden_layers=count_blocks(shapes, "encoder.layers."),
            num_attention_heads=hidden // 64,
            max_position_embeddings=shapes["embeddings.position_embedding.weight"][0],
            bos_token_id=0,
            eos_token_id=2,  # as published: pools at the highest token
        )
    )


def convert_text_encoder(tensors: Tensors) -> Tensors:
    """The names of the published file (`text_model.…`) → those of transformers."""
    return {
        name.removeprefix("text_model."): tensor
        for name, tensor in tensors.items()
        if not name.endswith("embeddings.position_ids")
    }


def build_text_encoder_2(shapes: Shapes, config: Mapping[str, Any] | None) -> nn.Module:
    """T5's encoder, version 1.1."""
    if config is not None:
        return T5EncoderModel(T5Config.from_dict(dict(config)))
    return T5EncoderModel(T5Config(**t5_settings(shapes), feed_forward_proj="gated-gelu"))


def build_vae(shapes: Shapes, config: Mapping[str, Any] | None) -> nn.Module:
    """The image VAE. From shapes, the scale and shift of the latents are the published ones."""
    if config is not None:
        return from_config(AutoencoderKL, config)
    levels = count_blocks(shapes, "encoder.down_blocks.")
    make: Any = AutoencoderKL  # annotates tuples of one level
    return make(
        in_channels=shapes["encoder.conv_in.weight"][1],
        out_channels=shapes["decoder.conv_out.weight"][0],
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=tuple(
            shapes[f"encoder.down_blocks.{i}.resnets.0.conv1.weight"][0] for i in range(levels)
        ),
        layers_per_block=count_blocks(shapes, "encoder.down_blocks.0.resnets."),
        latent_channels=shapes["decoder.conv_in.weight"][1],
        scaling_factor=0.3611,
        shift_factor=0.1159,
        use_quant_conv="quant_conv.weight" in shapes,
        use_post_quant_conv="post_quant_conv.weight" in shapes,
    )


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
        ("FluxTransformer2DModel",),
        build_dit,
        to_diffusers,
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
        ("CLIPTextModel",),
        build_text_encoder,
        convert_text_encoder,
    ),
    Component(
        "text_encoder_2",
        "text_encoder_2",
        (
            (
                "shared.weight",
                "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
                "encoder.final_layer_norm.weight",
            ),
        ),
        ("T5EncoderModel",),
        build_text_encoder_2,
    ),
    Component(
        "vae",
        "vae",
        (
            ("encoder.down_blocks.0.resnets.0.conv1.weight", "decoder.conv_norm_out.weight"),
            ("encoder.down.0.block.0.conv1.weight", "decoder.norm_out.weight"),
        ),
        ("AutoencoderKL",),
        build_vae,
        convert_vae,
        ("ae.safetensors",),
    ),
    Component(
        "controlnet",
        "controlnet",
        (("controlnet_x_embedder.weight", "controlnet_blocks.0.weight"),),
        ("FluxControlNetModel",),
        build_controlnet,
        # In repositories of their own, beside nothing else.
        origin=("diffusion_pytorch_model*.safetensors",),
        prefix="pipe.controlnet.models.0.",
    ),
)
