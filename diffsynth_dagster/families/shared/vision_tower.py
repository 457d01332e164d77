"""The vision tower of CLIP's ViT-H/14: its component, and pictures → hidden states."""

from typing import Any

import torch
from torch.nn import functional
from transformers import CLIPVisionModel
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from diffsynth_dagster.families.contract import (
    Component,
    ComponentNames,
    Construction,
    Recognition,
    Settings,
    Shapes,
    Tensors,
)
from diffsynth_dagster.families.shared.architecture import clip_settings
from diffsynth_dagster.families.shared.names import with_new_start, with_new_starts

HEAD = 80  # channels of an attention head of ViT-H/14; no shape shows them
_LAYERS = {
    "norm1.": "layer_norm1.",
    "attn.to_qkv.": "self_attn.to_qkv.",
    "attn.proj.": "self_attn.out_proj.",
    "norm2.": "layer_norm2.",
    "mlp.0.": "mlp.fc1.",
    "mlp.2.": "mlp.fc2.",
    "": "",
}
_NAMES = {
    "cls_embedding": "embeddings.class_embedding",
    "pos_embedding": "embeddings.position_embedding.weight",
    "patch_embedding.": "embeddings.patch_embedding.",
    "pre_norm.": "pre_layrnorm.",
    "post_norm.": "post_layernorm.",
    **{f"transformer.*.{old}": f"encoder.layers.*.{new}" for old, new in _LAYERS.items()},
}
"""Prefixes in `models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth`, after `visual.` → in
transformers, which spells `pre_layrnorm` like this."""


def vision_settings(shapes: Shapes) -> Settings:
    """The settings of the vision tower. The activation is that of the published ViT-H/14."""
    patch = shapes["embeddings.patch_embedding.weight"][2]
    positions = shapes["embeddings.position_embedding.weight"][0]
    return {
        **clip_settings(shapes, HEAD),
        "image_size": int((positions - 1) ** 0.5) * patch,
        "patch_size": patch,
        "hidden_act": "gelu",
    }


def convert_vision(tensors: Tensors) -> Tensors:
    """Rename the tensors of open_clip's file, or of older transformers files (`vision_model.…`), to
    transformers' names.

    open_clip's file has both towers. Text tower, projection and temperature are dropped.
    """
    if not any(name.startswith("visual.") for name in tensors):
        return with_new_starts(tensors, {"vision_model.": ""})
    renamed: Tensors = {}
    for name, tensor in tensors.items():
        tower, _, rest = name.partition(".")
        if tower != "visual" or rest == "head":
            continue
        new = with_new_start(rest, _NAMES)
        # The two embeddings have extra dimensions of size 1 there.
        if rest == "cls_embedding":
            renamed[new] = tensor.flatten()
        elif rest == "pos_embedding":
            renamed[new] = tensor.squeeze(0)
        elif ".attn.to_qkv." in rest:
            for letter, third in zip("qkv", tensor.chunk(3), strict=True):
                renamed[new.replace(".to_qkv.", f".{letter}_proj.")] = third
        else:
            renamed[new] = tensor
    return renamed


def vision_tower(name: str) -> Component:
    """The component of CLIP's vision tower. Reads the names of transformers, or of open_clip as in
    Wan's files.

    Args:
        name: name of the component and of its folder.
    """
    return Component(
        name=name,
        recognition=Recognition(
            signatures=(
                ("vision_model.embeddings.class_embedding", "vision_model.pre_layrnorm.weight"),
                ("embeddings.class_embedding", "pre_layrnorm.weight"),
                ("visual.cls_embedding", "visual.pre_norm.weight"),
            ),
            original_globs=("models_clip_*",),
        ),
        construction=Construction(
            kind=CLIPVisionModel, settings=vision_settings, convert=convert_vision
        ),
        names=ComponentNames(folder=name),
    )


def penultimate_states(tower: Any, frames: torch.Tensor) -> torch.Tensor:
    """Frames (N, 3, H, W) in [-1, 1] → CLIP's penultimate hidden states (N, tokens, hidden).

    The whole frame is resized to CLIP's square, with bicubic interpolation and no antialiasing, as
    Wan's authors do (`CLIPModel.visual`). CLIP's own image processor, which is published with the
    weights, would crop a wide frame.
    """
    side: int = tower.config.image_size
    square = functional.interpolate(frames.float(), (side, side), mode="bicubic")
    mean, std = (
        torch.tensor(channels, device=square.device).view(3, 1, 1)
        for channels in (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD)
    )
    inputs = ((square * 0.5 + 0.5 - mean) / std).to(tower.device, tower.dtype)
    return tower(pixel_values=inputs, output_hidden_states=True).hidden_states[-2]
