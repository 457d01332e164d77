"""The encoders of T5 and UMT5: their components and tokenizers, and prompts → embeddings."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from transformers import (
    AutoTokenizer,
    T5EncoderModel,
    T5TokenizerFast,  # pyright: ignore[reportAttributeAccessIssue]  (an alias made when imported)
    UMT5EncoderModel,
)

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
from diffsynth_dagster.families.shared.text import encode_by_length, padded_tokens, tokens

END = "</s>"
"""The token at the end of a prompt."""
_BIAS = "encoder.block.{}.layer.0.SelfAttention.relative_attention_bias.weight"
_BLOCKS = {
    "norm1.": "layer.0.layer_norm.",
    "attn.": "layer.0.SelfAttention.",
    "pos_embedding.embedding.": "layer.0.SelfAttention.relative_attention_bias.",
    "norm2.": "layer.1.layer_norm.",
    "ffn.gate.0.": "layer.1.DenseReluDense.wi_0.",
    "ffn.fc1.": "layer.1.DenseReluDense.wi_1.",
    "ffn.fc2.": "layer.1.DenseReluDense.wo.",
    "": "",
}
_UMT5_NAMES = {
    "token_embedding.": "shared.",
    "norm.": "encoder.final_layer_norm.",
    **{f"blocks.*.{old}": f"encoder.block.*.{new}" for old, new in _BLOCKS.items()},
}
"""Prefixes in `models_t5_umt5-xxl-enc-bf16.pth` → in transformers."""


def umt5_settings(shapes: Shapes) -> Settings:
    """The settings of UMT5's encoder."""
    attention = "encoder.block.0.layer.0.SelfAttention."
    vocabulary, hidden = shapes["shared.weight"]
    buckets, heads = shapes[f"{attention}relative_attention_bias.weight"]
    return {
        "vocab_size": vocabulary,
        "d_model": hidden,
        "d_kv": shapes[f"{attention}q.weight"][0] // heads,
        "d_ff": shapes["encoder.block.0.layer.1.DenseReluDense.wi_0.weight"][0],
        "num_layers": count_blocks(shapes, "encoder.block."),
        "num_heads": heads,
        "relative_attention_num_buckets": buckets,
    }


def t5_settings(shapes: Shapes) -> Settings:
    """The settings of T5's encoder, version 1.1."""
    return {**umt5_settings(shapes), "feed_forward_proj": "gated-gelu"}


def t5_encoder(name: str) -> Component:
    """The component of T5's encoder.

    Args:
        name: name of the component and of its folder.
    """
    # UMT5's files have these tensors too, and a position table in every block. A family lists one
    # of the two.
    marks = ("shared.weight", _BIAS.format(0), "encoder.final_layer_norm.weight")
    return Component(
        name=name,
        recognition=Recognition(signatures=(marks,)),
        construction=Construction(kind=T5EncoderModel, settings=t5_settings),
        names=ComponentNames(folder=name),
    )


def umt5_encoder(name: str) -> Component:
    """The component of UMT5's encoder. Reads the names of transformers or of Wan's authors.

    Args:
        name: name of the component and of its folder.
    """
    return Component(
        name=name,
        recognition=Recognition(
            signatures=(
                # T5 has a position table in block 0 alone, UMT5 in every block.
                ("shared.weight", _BIAS.format(0), _BIAS.format(1)),
                ("token_embedding.weight", "blocks.0.pos_embedding.embedding.weight"),
            ),
            original_globs=("models_t5_*",),
        ),
        construction=Construction(
            kind=UMT5EncoderModel,
            settings=umt5_settings,
            convert=partial(with_new_starts, starts=_UMT5_NAMES),
        ),
        names=ComponentNames(folder=name),
    )


def t5_tokenizer(name: str, parameter: str, default: str) -> Tokenizer:
    """T5's tokenizer: see `Tokenizer`."""
    return Tokenizer(name, parameter, default, T5TokenizerFast.from_pretrained, (END,))


def umt5_tokenizer(name: str, parameter: str, default: str) -> Tokenizer:
    """UMT5's tokenizer, of the class that its files name: see `Tokenizer`."""
    make: Any = AutoTokenizer
    load = partial(make.from_pretrained, trust_remote_code=False)
    return Tokenizer(name, parameter, default, load, (END,))


def encode_padded(
    tokenizer: Any, encoder: Any, samples: Sequence[Sample], length: int
) -> torch.Tensor:
    """The prompts of samples, truncated or padded → hidden states (B, length, hidden).

    For models that attend to the padding.
    """
    ids = padded_tokens(tokenizer, samples, length).to(encoder.device)
    return encoder(ids).last_hidden_state


def encode_unpadded(
    tokenizer: Any, encoder: Any, prompts: Sequence[str], length: int
) -> list[torch.Tensor]:
    """Prompts → the hidden states (L, hidden) of each, L at most `length`."""

    def encode(ids: torch.Tensor) -> torch.Tensor:
        return encoder(ids, torch.ones_like(ids)).last_hidden_state

    return encode_by_length(tokens(tokenizer, prompts, length), encode, encoder.device)
