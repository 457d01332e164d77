"""Gemma 3 as a text encoder: its component and tokenizer, and the hidden states of all layers."""

from typing import Any

import torch
from transformers import AutoTokenizer, Gemma3ForConditionalGeneration

from diffsynth_dagster.families.contract import (
    Component,
    ComponentNames,
    Construction,
    Recognition,
    Sample,
    Settings,
    Shapes,
    Tokenizer,
)
from diffsynth_dagster.families.shared.architecture import count_blocks
from diffsynth_dagster.families.shared.names import with_new_starts


def text_encoder_settings(shapes: Shapes) -> Settings:
    """The settings of Gemma 3. Constants that no shape shows are as published."""
    text, vision = "model.language_model.", "model.vision_tower."
    vocabulary, hidden = shapes[f"{text}embed_tokens.weight"]
    layer, head = f"{text}layers.0.", shapes[f"{text}layers.0.self_attn.q_norm.weight"][0]
    width, _, patch, _ = shapes[f"{vision}embeddings.patch_embedding.weight"]
    positions = shapes[f"{vision}embeddings.position_embedding.weight"][0]
    return {
        "text_config": {
            "vocab_size": vocabulary,
            "hidden_size": hidden,
            "intermediate_size": shapes[f"{layer}mlp.gate_proj.weight"][0],
            "num_hidden_layers": count_blocks(shapes, f"{text}layers."),
            "num_attention_heads": shapes[f"{layer}self_attn.q_proj.weight"][0] // head,
            "num_key_value_heads": shapes[f"{layer}self_attn.k_proj.weight"][0] // head,
            "head_dim": head,
            "query_pre_attn_scalar": head,
            "sliding_window": 1024,
            "rope_parameters": {
                "full_attention": {
                    "rope_type": "linear",
                    "factor": 8.0,
                    "rope_theta": 1_000_000.0,
                },
                "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
            },
        },
        "vision_config": {
            "hidden_size": width,
            "intermediate_size": shapes[f"{vision}encoder.layers.0.mlp.fc1.weight"][0],
            "num_hidden_layers": count_blocks(shapes, f"{vision}encoder.layers."),
            "num_attention_heads": 16,
            "image_size": int(positions**0.5) * patch,
            "patch_size": patch,
            "vision_use_head": False,
        },
        "mm_tokens_per_image": 256,
    }


_GEMMA = {
    "language_model.model.": "model.language_model.",
    "language_model.lm_head.": "lm_head.",
    "vision_tower.vision_model.": "model.vision_tower.",
    "vision_tower.": "model.vision_tower.",
    "multi_modal_projector.": "model.multi_modal_projector.",
}
GEMMA_3 = Component(
    name="text_encoder",
    recognition=Recognition(
        signatures=(
            ("model.language_model.layers.0.pre_feedforward_layernorm.weight",),
            ("language_model.model.layers.0.pre_feedforward_layernorm.weight",),
        ),
        original_globs=("model-*.safetensors",),
    ),
    construction=Construction(
        kind=Gemma3ForConditionalGeneration,
        settings=text_encoder_settings,
        convert=lambda tensors: with_new_starts(tensors, _GEMMA),
    ),
    names=ComponentNames(folder="text_encoder"),
)


def all_states(
    tokenizer: Any, encoder: Any, sample: Sample, length: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Encode a prompt, padded at the left to L = `length` tokens.

    Returns:
        The hidden states before the first layer and after each, concatenated per token
        (1, L, hidden * states), and the attention mask (1, L).
    """
    tokens = tokenizer(
        sample["prompt"].strip(),
        padding="max_length",
        padding_side="left",
        max_length=length,
        truncation=True,
        return_tensors="pt",
    ).to(encoder.device)
    ids, mask = tokens.input_ids, tokens.attention_mask
    output = encoder(input_ids=ids, attention_mask=mask, output_hidden_states=True)
    return torch.stack(output.hidden_states, dim=-1).flatten(2), mask


def _load_tokenizer(folder: str) -> Any:
    """Load a tokenizer with the class that its files name, but never with code from the folder."""
    make: Any = AutoTokenizer
    return make.from_pretrained(folder, trust_remote_code=False)


GEMMA_TOKENIZER = Tokenizer(
    "tokenizer",
    "tokenizer_path",
    "google/gemma-3-12b-it-qat-q4_0-unquantized:/",
    _load_tokenizer,
    ("<bos>",),
)
