"""CLIP's text encoders: their components, and prompts → embeddings."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers.loaders.single_file_utils import convert_open_clip_checkpoint
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from diffsynth_dagster.families.contract import (
    Component,
    ComponentNames,
    Construction,
    Loaded,
    Recognition,
    Sample,
    Settings,
    Shapes,
    Tensors,
    Tokenizer,
)
from diffsynth_dagster.families.limits import TokenLimit
from diffsynth_dagster.families.lora import LoraRules
from diffsynth_dagster.families.shared.architecture import clip_settings
from diffsynth_dagster.families.shared.kohya import CLIP, PROJECTED_CLIP
from diffsynth_dagster.families.shared.text import padded_tokens

LIMIT = TokenLimit(
    "tokenizer",
    77,
    advice="shorten them, or let more be read in chunks of 75 tokens with caption_chunks",
)
LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "out_proj")
"""The attention layers."""
_NAMES = (
    "embeddings.token_embedding.weight",
    "encoder.layers.0.self_attn.q_proj.weight",
    "final_layer_norm.weight",
)


def lora(
    folder: str, load: Callable[..., None], kohya: tuple[str, ...], projected: bool = False
) -> LoraRules:
    """The LoRA rules of a text encoder.

    Args:
        folder, load, kohya: see `LoraRules`.
        projected: whether our module includes the projection.
    """
    names = PROJECTED_CLIP if projected else CLIP
    return LoraRules(folder, load, targets=LORA_TARGETS, authors=names, comfyui=folder, kohya=kohya)


def clip_tokenizer(name: str, parameter: str, default: str) -> Tokenizer:
    """CLIP's tokenizer: see `Tokenizer`."""
    load = CLIPTokenizer.from_pretrained
    return Tokenizer(name, parameter, default, load, ("<|endoftext|>",))


def clip_text_encoder(*checkpoint_prefixes: str, lora: LoraRules | None = None) -> Component:
    """The component `text_encoder`: CLIP's text tower, as OpenAI published it.

    Args:
        checkpoint_prefixes: see `Recognition`.
        lora: see `ComponentNames`.
    """
    return Component(
        name="text_encoder",
        recognition=Recognition(
            # Published files have the prefix; transformers' own module has none.
            signatures=tuple(
                tuple(prefix + name for name in _NAMES) for prefix in ("text_model.", "")
            ),
            checkpoint_prefixes=checkpoint_prefixes,
        ),
        construction=Construction(
            kind=CLIPTextModel, settings=_text_settings, convert=_convert_text_encoder
        ),
        names=ComponentNames(folder="text_encoder", lora=lora),
    )


def projected_text_encoder(
    name: str, *checkpoint_prefixes: str, lora: LoraRules | None = None
) -> Component:
    """CLIP's text tower with its projection, as OpenCLIP trained it.

    Reads the names of transformers or OpenCLIP. A family must list it before an encoder without a
    projection, whose names are a subset of this one's.

    Args:
        name: name of the component and of its folder.
        checkpoint_prefixes: see `Recognition`.
        lora: see `ComponentNames`.
    """
    return Component(
        name=name,
        recognition=Recognition(
            signatures=(
                ("text_projection.weight", *(f"text_model.{name}" for name in _NAMES)),
                ("text_projection", "positional_embedding", "token_embedding.weight"),
            ),
            checkpoint_prefixes=checkpoint_prefixes,
        ),
        construction=Construction(
            kind=CLIPTextModelWithProjection,
            settings=_projected_settings,
            convert=_convert_projected,
        ),
        names=ComponentNames(folder=name, lora=lora),
    )


def _text_settings(shapes: Shapes) -> Settings:
    """The settings of a text tower."""
    return {
        **clip_settings(shapes, head=64),  # as in every published size
        "vocab_size": shapes["embeddings.token_embedding.weight"][0],
        "max_position_embeddings": shapes["embeddings.position_embedding.weight"][0],
        "bos_token_id": 0,
        # As published, though wrong: transformers then pools at the highest id, the real end token.
        "eos_token_id": 2,
    }


def _projected_settings(shapes: Shapes) -> Settings:
    """The settings of a text tower with its projection."""
    tower = {name.removeprefix("text_model."): shape for name, shape in shapes.items()}
    projection = shapes["text_projection.weight"][0]
    return {**_text_settings(tower), "hidden_act": "gelu", "projection_dim": projection}


def _convert_text_encoder(tensors: Tensors) -> Tensors:
    """Rename the tensors of published files (`text_model.…`) to transformers' names."""
    return {n.removeprefix("text_model."): t for n, t in _without_positions(tensors).items()}


def _convert_projected(tensors: Tensors) -> Tensors:
    """Rename OpenCLIP's tensors to transformers' names."""
    if "positional_embedding" in tensors:
        return convert_open_clip_checkpoint(None, tensors, prefix="")
    return _without_positions(tensors)


def _without_positions(tensors: Tensors) -> Tensors:
    """Drop the position ids 0, 1, …, 76, which older versions of transformers saved as a tensor."""
    return {n: t for n, t in tensors.items() if not n.endswith("embeddings.position_ids")}


def encode_text(
    loaded: Loaded, samples: Sequence[Sample], tokenizer: str, encoder: str, hidden: bool
) -> tuple[torch.Tensor, Any]:
    """Prompts → embeddings (B, 77, width), truncated or padded, and all outputs of the encoder.

    Args:
        tokenizer, encoder: names of the components.
        hidden: whether to return the penultimate hidden states, without the final norm, instead of
            the last ones.
    """
    clip: Any = loaded[encoder]
    tokens = padded_tokens(loaded[tokenizer], samples, clip.config.max_position_embeddings)
    outputs = clip(tokens.to(clip.device), output_hidden_states=hidden)
    return outputs.hidden_states[-2] if hidden else outputs.last_hidden_state, outputs
