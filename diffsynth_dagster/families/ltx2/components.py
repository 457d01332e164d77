"""The components of LTX-2 and 2.3: how to recognise their files, and their settings from shapes.

Reads the diffusers folders; the authors' single file, which contains all but the text encoder; or
the same tensors split into one file per component. The VAEs of split files may lack their decoders.
"""

from functools import partial

from diffusers import LTX2Pipeline, LTX2VideoTransformer3DModel
from diffusers.loaders import single_file_utils

from diffsynth_dagster.families.contract import (
    Component,
    ComponentNames,
    Construction,
    Recognition,
    Settings,
    Shapes,
    Tensors,
)
from diffsynth_dagster.families.lora import LoraRules
from diffsynth_dagster.families.shared.architecture import count_blocks
from diffsynth_dagster.families.shared.fused_names import AuthorsNames
from diffsynth_dagster.families.shared.gemma import GEMMA_3
from diffsynth_dagster.families.shared.ltx_text import LTX2_CONNECTORS
from diffsynth_dagster.families.shared.ltx_vae import LTX2_AUDIO_VAE, LTX2_VAE, LTX2_VOCODER
from diffsynth_dagster.families.shared.names import with_new_starts
from diffsynth_dagster.families.shared.pipeline import load_into_transformer

HEAD, AUDIO_HEAD = 128, 64
"""Channels of an attention head for video and for sound, as published. No shape shows them."""
_ROTARY: Settings = {"rope_type": "split", "rope_double_precision": True}


def dit_settings(shapes: Shapes) -> Settings:
    """The settings of the transformer over video and sound."""
    block = "transformer_blocks.0."
    inner, in_channels = shapes["proj_in.weight"]
    audio_inner, audio_in_channels = shapes["audio_proj_in.weight"]
    caption = shapes.get("caption_projection.linear_1.weight")
    return {
        "in_channels": in_channels,
        "out_channels": shapes["proj_out.weight"][0],
        "num_attention_heads": inner // HEAD,
        "attention_head_dim": HEAD,
        "cross_attention_dim": shapes[f"{block}attn2.to_k.weight"][1],
        "audio_in_channels": audio_in_channels,
        "audio_out_channels": shapes["audio_proj_out.weight"][0],
        "audio_num_attention_heads": audio_inner // AUDIO_HEAD,
        "audio_attention_head_dim": AUDIO_HEAD,
        "audio_cross_attention_dim": shapes[f"{block}audio_attn2.to_k.weight"][1],
        "num_layers": count_blocks(shapes, "transformer_blocks."),
        "use_prompt_embeddings": caption is not None,
        **({"caption_channels": caption[1]} if caption else {}),
        # New in 2.3.
        "gated_attn": f"{block}attn1.to_gate_logits.weight" in shapes,
        "audio_gated_attn": f"{block}audio_attn1.to_gate_logits.weight" in shapes,
        "cross_attn_mod": f"{block}prompt_scale_shift_table" in shapes,
        "audio_cross_attn_mod": f"{block}audio_prompt_scale_shift_table" in shapes,
        **_ROTARY,
    }


_PROMPT = {
    "prompt_adaln_single.": "prompt_adaln.",
    "audio_prompt_adaln_single.": "audio_prompt_adaln.",
}


def convert_dit(tensors: Tensors) -> Tensors:
    """Rename the authors' tensors to diffusers' names."""
    # diffusers' converter does not know these two modules of 2.3.
    named = with_new_starts(tensors, _PROMPT)
    return single_file_utils.convert_ltx2_transformer_to_diffusers(named)


_ATTENTIONS = (
    *("attn1", "attn2", "audio_attn1", "audio_attn2"),
    *("audio_to_video_attn", "video_to_audio_attn"),
)
_BLOCK = (
    *(
        f"{attention}.{layer}"
        for attention in _ATTENTIONS
        for layer in ("to_q", "to_k", "to_v", "to_out.0", "to_gate_logits")
    ),
    *(f"{feed}.net.{layer}" for feed in ("ff", "audio_ff") for layer in ("0.proj", "2")),
)
# Timestep embeddings outside the blocks: the authors' names → diffusers'.
_MODULATIONS = {
    "adaln_single": "time_embed",
    "audio_adaln_single": "audio_time_embed",
    "av_ca_video_scale_shift_adaln_single": "av_cross_attn_video_scale_shift",
    "av_ca_audio_scale_shift_adaln_single": "av_cross_attn_audio_scale_shift",
    "av_ca_a2v_gate_adaln_single": "av_cross_attn_video_a2v_gate",
    "av_ca_v2a_gate_adaln_single": "av_cross_attn_audio_v2a_gate",
    "prompt_adaln_single": "prompt_adaln",
    "audio_prompt_adaln_single": "audio_prompt_adaln",
}
_IN_MODULATION = (*(f"emb.timestep_embedder.linear_{n}" for n in (1, 2)), "linear")
NAMES = AuthorsNames(
    blocks={"transformer_blocks": ("transformer_blocks", {name: (name,) for name in _BLOCK})},
    outside={
        "patchify_proj": "proj_in",
        "audio_patchify_proj": "audio_proj_in",
        "proj_out": "proj_out",
        "audio_proj_out": "audio_proj_out",
        **{
            f"{side}caption_projection.linear_{n}": f"{side}caption_projection.linear_{n}"
            for side in ("", "audio_")
            for n in (1, 2)
        },
        **{
            f"{theirs}.{layer}": f"{ours}.{layer}"
            for theirs, ours in _MODULATIONS.items()
            for layer in _IN_MODULATION
        },
    },
)
"""The authors' layer names."""

COMPONENTS = (
    Component(
        name="dit",
        recognition=Recognition(
            signatures=(
                ("proj_in.weight", "audio_proj_in.weight", "audio_time_embed.linear.weight"),
                ("patchify_proj.weight", "audio_patchify_proj.weight"),
            ),
            checkpoint_prefixes=("model.diffusion_model.",),
            original_globs=("transformer.safetensors",),
        ),
        construction=Construction(
            kind=LTX2VideoTransformer3DModel, settings=dit_settings, convert=convert_dit
        ),
        names=ComponentNames(
            folder="transformer",
            lora=LoraRules(
                "transformer",
                partial(load_into_transformer, LTX2Pipeline),
                targets=("to_k", "to_q", "to_v", "to_out.0"),
                authors=NAMES,
                guide=NAMES,
                folds=True,  # diffusers ignores the alphas of this family
            ),
        ),
    ),
    GEMMA_3,
    LTX2_CONNECTORS,
    LTX2_VAE,
    LTX2_AUDIO_VAE,
    LTX2_VOCODER,
)
