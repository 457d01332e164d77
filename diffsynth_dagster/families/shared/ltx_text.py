"""LTX-2's prompts: Gemma 3, followed by two connectors, one for the video and one for the sound."""

from collections.abc import Sequence

from diffusers.pipelines.ltx2 import LTX2TextConnectors

from diffsynth_dagster.families.contract import (
    Component,
    ComponentNames,
    Construction,
    Loaded,
    Output,
    Recognition,
    Sample,
    Settings,
    Shapes,
    Stage,
    Tensors,
)
from diffsynth_dagster.families.limits import TokenLimit
from diffsynth_dagster.families.shared.architecture import count_blocks
from diffsynth_dagster.families.shared.gemma import all_states
from diffsynth_dagster.families.shared.names import with_new_starts
from diffsynth_dagster.families.shared.stages import PROMPT

PROMPT_TOKENS = 1024
GEMMA_STATES = 49
"""The number of hidden states of Gemma 3 12B that the connectors read: one before the first of 48
layers, and one after each."""
HEAD, AUDIO_HEAD = 128, 64
"""Channels of an attention head of the connectors. In 2.3 the sound connector has AUDIO_HEAD."""


def connector_settings(shapes: Shapes) -> Settings:
    """The settings of the connectors between the text encoder and the transformer."""
    # 2.0 has one projection of the prompt for both connectors, 2.3 has two.
    is_2_3 = "video_text_proj_in.weight" in shapes
    projected, states = shapes["video_text_proj_in.weight" if is_2_3 else "text_proj_in.weight"]
    settings: Settings = {
        # 2.0 projects to Gemma's width, which its number of states follows from. 2.3 projects to
        # another width, so the number of states must be known.
        "caption_channels": states // GEMMA_STATES if is_2_3 else projected,
        "text_proj_in_factor": GEMMA_STATES if is_2_3 else states // projected,
        "per_modality_projections": is_2_3,
        "proj_bias": any(name.endswith("text_proj_in.bias") for name in shapes),
        "rope_type": "split",
        "rope_double_precision": True,
    }
    for kind, head in (("video", HEAD), ("audio", AUDIO_HEAD if is_2_3 else HEAD)):
        registers, inner = shapes[f"{kind}_connector.learnable_registers"]
        blocks = f"{kind}_connector.transformer_blocks."
        settings |= {
            f"{kind}_connector_num_attention_heads": inner // head,
            f"{kind}_connector_attention_head_dim": head,
            f"{kind}_connector_num_layers": count_blocks(shapes, blocks),
            f"{kind}_connector_num_learnable_registers": registers,
            f"{kind}_gated_attn": f"{blocks}0.attn1.to_gate_logits.weight" in shapes,
        }
        if is_2_3:
            settings[f"{kind}_hidden_dim"] = shapes[f"{kind}_text_proj_in.weight"][0]
    return settings


_CONNECTORS = {
    "text_embedding_projection.aggregate_embed.": "text_proj_in.",
    "text_embedding_projection.video_aggregate_embed.": "video_text_proj_in.",
    "text_embedding_projection.audio_aggregate_embed.": "audio_text_proj_in.",
    "model.diffusion_model.video_embeddings_connector.": "video_connector.",
    "model.diffusion_model.audio_embeddings_connector.": "audio_connector.",
}


def convert_connectors(tensors: Tensors) -> Tensors:
    """Rename the authors' tensors to diffusers' names, and drop those of other components."""
    if "video_connector.learnable_registers" in tensors:
        return tensors
    connectors = {n: t for n, t in tensors.items() if n.startswith(tuple(_CONNECTORS))}
    new_parts = (
        ("transformer_1d_blocks", "transformer_blocks"),
        ("q_norm", "norm_q"),
        ("k_norm", "norm_k"),
    )
    renamed: Tensors = {}
    for name, tensor in with_new_starts(connectors, _CONNECTORS).items():
        for old, new in new_parts:
            name = name.replace(old, new)
        renamed[name] = tensor
    return renamed


LTX2_CONNECTORS = Component(
    name="text_encoder_post_modules",
    recognition=Recognition(
        signatures=(
            ("video_connector.learnable_registers", "audio_connector.learnable_registers"),
            tuple(f"{start}learnable_registers" for start in list(_CONNECTORS)[-2:]),
        ),
        original_globs=("text_encoder_post_modules.safetensors",),
    ),
    construction=Construction(
        kind=LTX2TextConnectors, settings=connector_settings, convert=convert_connectors
    ),
    names=ComponentNames(folder="connectors"),
)


def encode_prompt(loaded: Loaded, samples: Sequence[Sample]) -> list[Tensors]:
    """Prompt → `prompt_embeds` and `audio_prompt_embeds` (1024, hidden).

    The connectors read all hidden states of the text encoder, and replace the padding with learned
    tokens. So the outputs need no mask.
    """
    results: list[Tensors] = []
    # One prompt at a time: its hidden states take 400 MB in the published model.
    for sample in samples:
        encoder = loaded["text_encoder"]
        states, mask = all_states(loaded["tokenizer"], encoder, sample, PROMPT_TOKENS)
        video, audio, _ = loaded["text_encoder_post_modules"](states, mask, padding_side="left")
        results.append({"prompt_embeds": video[0], "audio_prompt_embeds": audio[0]})
    return results


PROMPT_STAGE = Stage(
    "prompt",
    (PROMPT,),
    ("tokenizer", "text_encoder", "text_encoder_post_modules"),
    (Output("prompt_embeds", "condition"), Output("audio_prompt_embeds", "condition")),
    encode_prompt,
    limit=TokenLimit("tokenizer", PROMPT_TOKENS, str.strip),
)
