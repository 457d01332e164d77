"""The modules of Wan: their files and their settings."""

from dataclasses import replace

from diffusers import AutoencoderKLWan, WanTransformer3DModel, WanVACETransformer3DModel
from transformers import CLIPVisionModel, UMT5EncoderModel

from diffsynth_dagster.families.contract import Component, Settings, Shapes
from diffsynth_dagster.families.shared.architecture import (
    clip_settings,
    count_blocks,
    t5_settings,
)
from diffsynth_dagster.families.wanvideo.names import (
    convert_dit,
    convert_image_encoder,
    convert_text_encoder,
    convert_vae,
)

PATCH = 2
HEAD = 128
VISION_HEAD = 80
WIDE_LATENTS = 48
"""Latent channels of Wan2.2's VAE of 16x16x4, which first folds patches of 2x2 pixels."""

# Wan2.2_VAE.pth does not hold these; they are those of Wan-AI/Wan2.2-TI2V-5B-Diffusers.
_WIDE_MEAN = """
    -0.2289 -0.0052 -0.1323 -0.2339 -0.2799  0.0174  0.1838  0.1557 -0.1382  0.0542  0.2813  0.0891
     0.1570 -0.0098  0.0375 -0.1825 -0.2246 -0.1207 -0.0698  0.5109  0.2665 -0.2108 -0.2158  0.2502
    -0.2055 -0.0322  0.1109  0.1567 -0.0729  0.0899 -0.2799 -0.1230 -0.0313 -0.1649  0.0117  0.0723
    -0.2839 -0.2083 -0.0520  0.3748  0.0152  0.1957  0.1433 -0.2944  0.3573 -0.0548 -0.1681 -0.0667
"""
_WIDE_STD = """
    0.4765 1.0364 0.4514 1.1677 0.5313 0.4990 0.4818 0.5013 0.8158 1.0344 0.5894 1.0901
    0.6885 0.6165 0.8454 0.4978 0.5759 0.3523 0.7135 0.6804 0.5833 1.4146 0.8986 0.5659
    0.7069 0.5338 0.4889 0.4917 0.4069 0.4999 0.6866 0.4093 0.5709 0.6065 0.6415 0.4944
    0.5726 1.2042 0.5458 1.6887 0.3971 1.0600 0.3943 0.5537 0.5444 0.4089 0.7468 0.7744
"""


def dit_settings(shapes: Shapes) -> Settings:
    """The transformer, with VACE's blocks where there are any. A head has the 128 channels of every
    published size, and VACE's blocks stand beside evenly spread layers."""
    inner, in_channels = shapes["patch_embedding.weight"][:2]
    layers, vace = count_blocks(shapes, "blocks."), count_blocks(shapes, "vace_blocks.")
    embedder = "condition_embedder."
    settings: Settings = {
        "num_attention_heads": inner // HEAD,
        "attention_head_dim": HEAD,
        "in_channels": in_channels,
        "out_channels": shapes["proj_out.weight"][0] // PATCH**2,
        "text_dim": shapes[f"{embedder}text_embedder.linear_1.weight"][1],
        "freq_dim": shapes[f"{embedder}time_embedder.linear_1.weight"][1],
        "ffn_dim": shapes["blocks.0.ffn.net.0.proj.weight"][0],
        "num_layers": layers,
    }
    image = f"{embedder}image_embedder."
    if f"{image}norm1.weight" in shapes:
        positions = shapes.get(f"{image}pos_embed")
        settings["image_dim"] = shapes[f"{image}norm1.weight"][0]
        settings["added_kv_proj_dim"] = inner
        settings["pos_embed_seq_len"] = positions[1] if positions else None
    if vace:
        settings["vace_layers"] = list(range(0, layers, -(-layers // vace)))
        settings["vace_in_channels"] = 2 * in_channels + 64
    return settings


def vae_settings(shapes: Shapes) -> Settings:
    """The video VAE. The mean and deviation of the latents are the published ones.

    Raises:
        ValueError: none are published for this number of channels.
    """
    base, in_channels = shapes["encoder.conv_in.weight"][:2]
    channels = shapes["post_quant_conv.weight"][0]
    if channels not in (16, WIDE_LATENTS):
        raise ValueError(f"the mean and deviation of latents of {channels} channels are not known")
    settings: Settings = {
        "base_dim": base,
        "decoder_base_dim": shapes["decoder.norm_out.gamma"][0],
        "z_dim": channels,
        "in_channels": in_channels,
        "out_channels": in_channels,
        "is_residual": "encoder.down_blocks.0.resnets.0.conv1.weight" in shapes,
    }
    if channels == WIDE_LATENTS:
        settings["latents_mean"] = [float(value) for value in _WIDE_MEAN.split()]
        settings["latents_std"] = [float(value) for value in _WIDE_STD.split()]
    if in_channels > 3:
        settings |= {"patch_size": PATCH, "scale_factor_spatial": 16}
    return settings


def image_encoder_settings(shapes: Shapes) -> Settings:
    """CLIP's vision tower. A head has the 80 channels and the activation is that of the published
    ViT-H/14."""
    patch = shapes["embeddings.patch_embedding.weight"][2]
    tokens = shapes["embeddings.position_embedding.weight"][0]
    return {
        **clip_settings(shapes, VISION_HEAD),
        "image_size": int((tokens - 1) ** 0.5) * patch,
        "patch_size": patch,
        "hidden_act": "gelu",
    }


_DIT = Component(
    "dit",
    "transformer",
    (
        (
            "condition_embedder.time_embedder.linear_1.weight",
            "patch_embedding.weight",
            "proj_out.weight",
            "scale_shift_table",
        ),
        (
            "time_embedding.0.weight",
            "patch_embedding.weight",
            "head.head.weight",
            "head.modulation",
        ),
    ),
    WanTransformer3DModel,
    dit_settings,
    convert_dit,
    ("diffusion_pytorch_model*", "high_noise_model/*", "low_noise_model/*"),
    other_kinds={"vace_blocks.": WanVACETransformer3DModel},
)

COMPONENTS = (
    _DIT,
    replace(
        _DIT,
        name="dit2",
        folder="transformer_2",
        origin=("low_noise_model/*",),
        known_by=("low_noise", "transformer_2"),
        lora_folder=_DIT.folder,
    ),
    Component(
        "text_encoder",
        "text_encoder",
        (
            (
                "shared.weight",
                "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
                "encoder.block.1.layer.0.SelfAttention.relative_attention_bias.weight",
            ),
            ("token_embedding.weight", "blocks.0.pos_embedding.embedding.weight"),
        ),
        UMT5EncoderModel,
        t5_settings,
        convert_text_encoder,
        ("models_t5_*",),
    ),
    Component(
        "vae",
        "vae",
        (
            ("encoder.mid_block.attentions.0.to_qkv.weight", "post_quant_conv.weight"),
            ("encoder.middle.1.to_qkv.weight", "encoder.conv1.weight", "conv2.weight"),
        ),
        AutoencoderKLWan,
        vae_settings,
        convert_vae,
        ("Wan2.?_VAE.pth",),
    ),
    Component(
        "image_encoder",
        "image_encoder",
        (
            ("vision_model.embeddings.class_embedding", "vision_model.pre_layrnorm.weight"),
            ("embeddings.class_embedding", "pre_layrnorm.weight"),
            ("visual.cls_embedding", "visual.pre_norm.weight"),
        ),
        CLIPVisionModel,
        image_encoder_settings,
        convert_image_encoder,
        ("models_clip_*",),
    ),
)
