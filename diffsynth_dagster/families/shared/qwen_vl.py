"""Qwen2.5-VL as a text encoder: its component, and prompts (with pictures) → embeddings."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from PIL import Image
from transformers import Qwen2_5_VLForConditionalGeneration

from diffsynth_dagster.families.contract import (
    Component,
    ComponentNames,
    Construction,
    Loaded,
    Recognition,
    Settings,
    Shapes,
)
from diffsynth_dagster.families.shared.architecture import count_blocks
from diffsynth_dagster.families.shared.names import with_new_starts
from diffsynth_dagster.families.shared.text import encode_by_length, tokens

IMAGE_PAD = "<|image_pad|>"
MARKERS = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", IMAGE_PAD, "<|vision_end|>")
"""Special tokens of a conversation and of pictures in it."""
PICTURE = f"<|vision_start|>{IMAGE_PAD}<|vision_end|>"
"""The placeholder of a picture in a prompt."""
HEAD = 128  # channels of an attention head in every published size; no shape shows them
_TEXT, _VISION = "model.language_model.", "model.visual."
_NAMES = {"visual.": _VISION, _VISION: _VISION, _TEXT: _TEXT, "model.": _TEXT}
"""Prefixes in the published files (`visual.…`, `model.layers.…`) → in transformers. The new
prefixes are listed before `model.`, because the first match wins."""


def qwen_vl_settings(shapes: Shapes) -> Settings:
    """The settings of Qwen2.5-VL. Constants that no shape shows are as published."""
    vocabulary, hidden = shapes[f"{_TEXT}embed_tokens.weight"]
    layer, block = f"{_TEXT}layers.0.", f"{_VISION}blocks.0."
    text_config = {
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "num_hidden_layers": count_blocks(shapes, f"{_TEXT}layers."),
        "num_attention_heads": shapes[f"{layer}self_attn.q_proj.weight"][0] // HEAD,
        "num_key_value_heads": shapes[f"{layer}self_attn.k_proj.weight"][0] // HEAD,
        "intermediate_size": shapes[f"{layer}mlp.gate_proj.weight"][0],
        "max_position_embeddings": 128000,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {
            "rope_type": "default",
            "mrope_section": [16, 24, 24],
            "rope_theta": 1000000.0,
        },
    }
    vision_config = {
        "depth": count_blocks(shapes, f"{_VISION}blocks."),
        "hidden_size": shapes[f"{_VISION}patch_embed.proj.weight"][0],
        "intermediate_size": shapes[f"{block}mlp.gate_proj.weight"][0],
        "num_heads": 16,
        "out_hidden_size": shapes[f"{_VISION}merger.mlp.2.weight"][0],
        "tokens_per_second": 2,
    }
    return {
        "text_config": text_config,
        "vision_config": vision_config,
        "tie_word_embeddings": "lm_head.weight" not in shapes,
    }


QWEN_VL = Component(
    name="text_encoder",
    recognition=Recognition(
        signatures=(
            ("visual.merger.ln_q.weight", "model.embed_tokens.weight"),
            (f"{_VISION}merger.ln_q.weight", f"{_TEXT}embed_tokens.weight"),
        )
    ),
    construction=Construction(
        kind=Qwen2_5_VLForConditionalGeneration,
        settings=qwen_vl_settings,
        convert=partial(with_new_starts, starts=_NAMES),
    ),
    names=ComponentNames(folder="text_encoder"),
)


def count_before(tokenizer: Any, template: str) -> int:
    """The number of tokens of a template before its `{}`, where the prompt goes."""
    return len(tokenizer(template.split("{}")[0]).input_ids)


def encode_templated(
    loaded: Loaded, prompts: Sequence[str], template: str, length: int
) -> list[torch.Tensor]:
    """Prompts in a template → the last hidden states (L, hidden) of each, without those of the
    template's prefix.

    Args:
        length: the most tokens of a prompt with the template's suffix.
    """
    tokenizer, encoder = loaded["tokenizer"], loaded["text_encoder"]
    # The prefix is encoded with the prompt and dropped afterwards, so it does not count in `length`.
    drop = count_before(tokenizer, template)
    rows = tokens(tokenizer, [template.format(prompt) for prompt in prompts], length + drop)

    def encode(ids: torch.Tensor) -> torch.Tensor:
        mask = torch.ones_like(ids)
        return encoder.model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state

    return [states[drop:] for states in encode_by_length(rows, encode, encoder.device)]


def encode_with_pictures(
    loaded: Loaded, prompt: str, pictures: Sequence[Image.Image], template: str
) -> torch.Tensor:
    """A prompt in a template → its last hidden states (L, hidden), without those of the template's
    prefix.

    Args:
        prompt: contains `PICTURE` once for each picture.
    """
    tokenizer, encoder = loaded["tokenizer"], loaded["text_encoder"]
    processor: Any = loaded["processor"]
    seen = processor(images=list(pictures), return_tensors="pt").to(encoder.device)
    counts = seen["image_grid_thw"].prod(-1) // processor.merge_size**2
    # Each picture needs one IMAGE_PAD token for every embedding that the vision tower makes of it.
    first, *parts = template.format(prompt).split(IMAGE_PAD, len(pictures))
    padded = [IMAGE_PAD * count + part for count, part in zip(counts.tolist(), parts, strict=True)]
    text = "".join([first, *padded])
    ids = tokenizer(text, return_tensors="pt").input_ids.to(encoder.device)
    hidden = encoder.model(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        pixel_values=seen["pixel_values"],
        image_grid_thw=seen["image_grid_thw"],
        # Without the token types, the pictures' tokens get text positions, not rows and columns.
        mm_token_type_ids=(ids == encoder.config.image_token_id).int(),
        use_cache=False,
    )
    return hidden.last_hidden_state[0, count_before(tokenizer, template) :]
