"""The modules of Qwen-Image and its editing variants, and the form of their latents.

Modules come from diffusers and transformers. The published single files already carry diffusers'
tensor names, but for the text encoder's older ones.
"""

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import AutoencoderKLQwenImage, QwenImageTransformer2DModel
from torch import nn
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from diffsynth_dagster.families.contract import Component, Shapes, Tensors
from diffsynth_dagster.families.shared.support import PATCH, count_blocks, from_config


def build_dit(
    shapes: Shapes, config: Mapping[str, Any] | None, zero_cond_t: bool = False
) -> nn.Module:
    """The transformer. From shapes, the rotary axes take the published shares of a head: 1/8 for
    the frame, 7/16 for each side.

    Args:
        zero_cond_t: give all images but the first the timestep zero; also where the config.json
            asks for it.
    """
    if config is not None:
        override = {"zero_cond_t": True} if zero_cond_t else {}
        return from_config(QwenImageTransformer2DModel, {**config, **override})
    head = shapes["transformer_blocks.0.attn.norm_q.weight"][0]
    inner, in_channels = shapes["img_in.weight"]
    frame = head // 8
    side = (head - frame) // 2
    return QwenImageTransformer2DModel(
        patch_size=PATCH,
        in_channels=in_channels,
        out_channels=shapes["proj_out.weight"][0] // PATCH**2,
        num_layers=count_blocks(shapes, "transformer_blocks."),
        attention_head_dim=head,
        num_attention_heads=inner // head,
        joint_attention_dim=shapes["txt_in.weight"][1],
        axes_dims_rope=(frame, side, side),
        zero_cond_t=zero_cond_t,
    )


def build_vae(shapes: Shapes, config: Mapping[str, Any] | None) -> nn.Module:
    """The image VAE. From shapes, the mean and deviation of the latents are the published ones."""
    if config is not None:
        return from_config(AutoencoderKLQwenImage, config)
    return AutoencoderKLQwenImage(
        base_dim=shapes["encoder.conv_in.weight"][0],
        z_dim=shapes["post_quant_conv.weight"][0],
    )


def convert_text_encoder(tensors: Tensors) -> Tensors:
    """The names of the published files (`visual.…`, `model.layers.…`) → those of transformers."""
    renamed: Tensors = {}
    for name, tensor in tensors.items():
        if name.startswith("visual."):
            name = f"model.{name}"
        elif name.startswith("model.") and not name.startswith(
            ("model.visual.", "model.language_model.")
        ):
            name = name.replace("model.", "model.language_model.", 1)
        renamed[name] = tensor
    return renamed


def build_text_encoder(shapes: Shapes, config: Mapping[str, Any] | None) -> nn.Module:
    """Qwen2.5-VL. From shapes, a head has the 128 channels of every published size, and the
    rotary sections and the vision tower's constants are the published ones."""
    if config is not None:
        return Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig.from_dict(dict(config)))
    text, vision = "model.language_model.", "model.visual."
    vocabulary, hidden = shapes[text + "embed_tokens.weight"]
    tied = "lm_head.weight" not in shapes
    text_config = {
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "num_hidden_layers": count_blocks(shapes, text + "layers."),
        "num_attention_heads": shapes[text + "layers.0.self_attn.q_proj.weight"][0] // 128,
        "num_key_value_heads": shapes[text + "layers.0.self_attn.k_proj.weight"][0] // 128,
        "intermediate_size": shapes[text + "layers.0.mlp.gate_proj.weight"][0],
        "max_position_embeddings": 128000,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {
            "rope_type": "default",
            "mrope_section": [16, 24, 24],
            "rope_theta": 1000000.0,
        },
    }
    vision_config = {
        "depth": count_blocks(shapes, vision + "blocks."),
        "hidden_size": shapes[vision + "patch_embed.proj.weight"][0],
        "intermediate_size": shapes[vision + "blocks.0.mlp.gate_proj.weight"][0],
        "num_heads": 16,
        "out_hidden_size": shapes[vision + "merger.mlp.2.weight"][0],
        "tokens_per_second": 2,
    }
    return Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(
            text_config=text_config, vision_config=vision_config, tie_word_embeddings=tied
        )
    )


def _latent_moments(vae: AutoencoderKLQwenImage) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and deviation of the latents, each (1, C, 1, 1, 1) float32."""
    config: Any = vae.config
    mean = torch.tensor(config.latents_mean, device=vae.device).view(1, -1, 1, 1, 1)
    std = torch.tensor(config.latents_std, device=vae.device).view(1, -1, 1, 1, 1)
    return mean, std


def encode_pixels(vae: AutoencoderKLQwenImage, pixels: torch.Tensor) -> torch.Tensor:
    """Images (B, 3, H, W) in [-1, 1] → latents (B, C, H/8, W/8) float32: the mode of the VAE's
    posterior, normalised."""
    images = pixels.to(vae.device, vae.dtype).unsqueeze(2)
    posterior: Any = vae.encode(images)
    mean, std = _latent_moments(vae)
    return ((posterior.latent_dist.mode().float() - mean) / std).squeeze(2)


COMPONENTS = (
    Component(
        "dit",
        "transformer",
        (("txt_norm.weight", "txt_in.weight", "transformer_blocks.0.attn.add_q_proj.weight"),),
        ("QwenImageTransformer2DModel",),
        build_dit,
    ),
    Component(
        "text_encoder",
        "text_encoder",
        (
            ("visual.merger.ln_q.weight", "model.embed_tokens.weight"),
            ("model.visual.merger.ln_q.weight", "model.language_model.embed_tokens.weight"),
        ),
        ("Qwen2_5_VLForConditionalGeneration",),
        build_text_encoder,
        convert_text_encoder,
    ),
    Component(
        "vae",
        "vae",
        (("encoder.conv_in.weight", "decoder.conv_in.weight", "post_quant_conv.weight"),),
        ("AutoencoderKLQwenImage",),
        build_vae,
    ),
)
