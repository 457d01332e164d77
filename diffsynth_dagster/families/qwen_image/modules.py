"""The modules of Qwen-Image and its editing variants: their files and their settings.

Modules come from diffusers and transformers. The published single files already carry diffusers'
tensor names, but for the text encoder's older ones.
"""

from diffusers import AutoencoderKLQwenImage, QwenImageTransformer2DModel
from transformers import Qwen2_5_VLForConditionalGeneration

from diffsynth_dagster.families.contract import Component, Settings, Shapes, Tensors
from diffsynth_dagster.families.shared.architecture import (
    count_blocks,
    joint_transformer_settings,
)
from diffsynth_dagster.families.shared.names import with_new_starts
from diffsynth_dagster.families.shared.packing import PATCH

_TEXT_ENCODER = {
    "visual.": "model.visual.",
    "model.visual.": "model.visual.",
    "model.language_model.": "model.language_model.",
    "model.": "model.language_model.",
}
"""How names start in the published files (`visual.…`, `model.layers.…`) → in transformers."""


def dit_settings(shapes: Shapes) -> Settings:
    """The transformer."""
    return {
        **joint_transformer_settings(shapes, "img_in", "txt_in"),
        "patch_size": PATCH,
        "out_channels": shapes["proj_out.weight"][0] // PATCH**2,
    }


def vae_settings(shapes: Shapes) -> Settings:
    """The image VAE. The mean and deviation of the latents are the published ones."""
    return {
        "base_dim": shapes["encoder.conv_in.weight"][0],
        "z_dim": shapes["post_quant_conv.weight"][0],
    }


def convert_text_encoder(tensors: Tensors) -> Tensors:
    """The names of the published files → those of transformers."""
    return with_new_starts(tensors, _TEXT_ENCODER)


def text_encoder_settings(shapes: Shapes) -> Settings:
    """Qwen2.5-VL. A head has the 128 channels of every published size, and the rotary sections and
    the vision tower's constants are the published ones."""
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
    return {
        "text_config": text_config,
        "vision_config": vision_config,
        "tie_word_embeddings": tied,
    }


COMPONENTS = (
    Component(
        "dit",
        "transformer",
        (("txt_norm.weight", "txt_in.weight", "transformer_blocks.0.attn.add_q_proj.weight"),),
        QwenImageTransformer2DModel,
        dit_settings,
    ),
    Component(
        "text_encoder",
        "text_encoder",
        (
            ("visual.merger.ln_q.weight", "model.embed_tokens.weight"),
            ("model.visual.merger.ln_q.weight", "model.language_model.embed_tokens.weight"),
        ),
        Qwen2_5_VLForConditionalGeneration,
        text_encoder_settings,
        convert_text_encoder,
    ),
    Component(
        "vae",
        "vae",
        (("encoder.conv_in.weight", "decoder.conv_in.weight", "post_quant_conv.weight"),),
        AutoencoderKLQwenImage,
        vae_settings,
    ),
)
