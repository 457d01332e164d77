"""Stable Diffusion XL, tiny: with and without a ControlNet."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    ControlNetModel,
    DDIMScheduler,
    StableDiffusionXLControlNetPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from families.flux.cases import original_vae
from families.stable_diffusion.cases import (
    CONTROL,
    CONTROLNET,
    PARAMETERS,
    SCHEDULER,
    TEXT,
    control_image,
    first_unet_prediction,
    original_unet,
    reading_its_picture,
    rows,
    rows_with_control,
    save_whole,
    tiny_vae,
    write_tokenizer,
)
from family_case import Case

from diffsynth_dagster.families.contract import Tensors

ARCHITECTURE: dict[str, Any] = {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "block_out_channels": (32, 64, 128),
    "layers_per_block": 2,
    "transformer_layers_per_block": (1, 1, 2),
    "cross_attention_dim": 128,
    "attention_head_dim": (1, 1, 2),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 6 * 256 + 64,
}
UP = ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D")
SIZES = {"original_size": (80, 100), "crops_coords_top_left": (0, 8), "target_size": (64, 64)}
"""Of the rows: 100x80 pixels, resized to 80x64 and cropped to 64x64 in the middle."""


def write(folder: Path) -> None:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    torch.manual_seed(0)
    own = folder / "diffusers"
    write_tokenizer(own / "tokenizer")
    write_tokenizer(own / "tokenizer_2", pad="!")
    DDIMScheduler(**SCHEDULER).save_pretrained(own / "scheduler")
    unet, vae = UNet2DConditionModel(**ARCHITECTURE, up_block_types=UP), tiny_vae(0.13025)
    clip = CLIPTextModel(CLIPTextConfig(**TEXT))
    second = {**TEXT, "hidden_act": "gelu", "projection_dim": 64}
    open_clip = CLIPTextModelWithProjection(CLIPTextConfig(**second))
    unet.save_pretrained(own / "unet")
    vae.save_pretrained(own / "vae")
    clip.save_pretrained(own / "text_encoder")
    open_clip.save_pretrained(own / "text_encoder_2")
    net = ControlNetModel(**ARCHITECTURE, conditioning_embedding_out_channels=(8, 8, 16, 16))
    reading_its_picture(net).save_pretrained(folder / "controlnet" / "controlnet")
    whole = original_unet(unet.state_dict(), layers=2)
    whole |= {f"first_stage_model.{n}": t for n, t in original_vae(vae.state_dict()).items()}
    start = "conditioner.embedders.0.transformer.text_model."
    whole |= {start + name: tensor for name, tensor in clip.state_dict().items()}
    whole[f"{start}embeddings.position_ids"] = torch.arange(77)[None]
    start = "conditioner.embedders.1.model."
    whole |= {start + n: t for n, t in original_open_clip(open_clip.state_dict()).items()}
    whole[f"{start}logit_scale"] = torch.ones(())
    save_whole(whole, folder / "original" / "sdxl.safetensors")


def original_open_clip(state: Tensors) -> Tensors:
    """OpenCLIP's names, written from its published model."""
    outside = {
        "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
        "text_model.embeddings.position_embedding.weight": "positional_embedding",
        "text_model.final_layer_norm.weight": "ln_final.weight",
        "text_model.final_layer_norm.bias": "ln_final.bias",
    }
    inside = {
        "layer_norm1": "ln_1",
        "layer_norm2": "ln_2",
        "mlp.fc1": "mlp.c_fc",
        "mlp.fc2": "mlp.c_proj",
        "self_attn.out_proj": "attn.out_proj",
    }
    named = {theirs: state[ours] for ours, theirs in outside.items()}
    named["text_projection"] = state["text_projection.weight"].T
    for name, tensor in state.items():
        if not name.startswith("text_model.encoder.layers."):
            continue
        number, layer = name.removeprefix("text_model.encoder.layers.").split(".", 1)
        block = f"transformer.resblocks.{number}"
        layer, kind = layer.rsplit(".", 1)
        if layer in inside:
            named[f"{block}.{inside[layer]}.{kind}"] = tensor
        elif layer == "self_attn.q_proj":
            parts = [name.replace("q_proj", f"{part}_proj") for part in "qkv"]
            named[f"{block}.attn.in_proj_{kind}"] = torch.cat([state[part] for part in parts])
    return named


def parts_of(own: Path) -> dict[str, Any]:
    from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    return {
        "vae": AutoencoderKL.from_pretrained(own / "vae"),
        "text_encoder": CLIPTextModel.from_pretrained(own / "text_encoder"),
        "text_encoder_2": CLIPTextModelWithProjection.from_pretrained(own / "text_encoder_2"),
        "tokenizer": CLIPTokenizer.from_pretrained(own / "tokenizer"),
        "tokenizer_2": CLIPTokenizer.from_pretrained(own / "tokenizer_2"),
        "unet": UNet2DConditionModel.from_pretrained(own / "unet"),
        "scheduler": DDIMScheduler.from_pretrained(own / "scheduler"),
    }


def published(
    folder: Path, row: Mapping[str, Any], x_t: Tensors, lora: Path | None
) -> tuple[Tensors, float]:
    pipeline = StableDiffusionXLPipeline(**parts_of(folder / "diffusers"))
    return first_unet_prediction(pipeline, x_t, lora, prompt=row["prompt"], **SIZES)


def published_control(
    folder: Path, row: Mapping[str, Any], x_t: Tensors, lora: Path | None
) -> tuple[Tensors, float]:
    net = ControlNetModel.from_pretrained(folder / "controlnet" / "controlnet")
    pipeline = StableDiffusionXLControlNetPipeline(**parts_of(folder / "diffusers"), controlnet=net)
    image = control_image(row)
    return first_unet_prediction(pipeline, x_t, lora, prompt=row["prompt"], image=image, **SIZES)


TOKENIZERS = {
    "tokenizer_path": "diffusers/tokenizer",
    "tokenizer_2_path": "diffusers/tokenizer_2",
}
DIFFUSERS = [
    "diffusers/unet/diffusion_pytorch_model.safetensors",
    "diffusers/text_encoder/model.safetensors",
    "diffusers/text_encoder_2/model.safetensors",
    "diffusers/vae/diffusion_pytorch_model.safetensors",
]


def layouts(*more: str) -> dict[str, dict[str, Any]]:
    return {
        "diffusers": {"model_paths": [*DIFFUSERS, *more], **TOKENIZERS},
        "original": {"model_paths": ["original/sdxl.safetensors", *more], **TOKENIZERS},
    }


UNET_TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "proj_in")
COMMON: dict[str, Any] = {
    "family": "stable_diffusion_xl",
    "write": write,
    "base": "unet",
    "targets": UNET_TARGETS,
    "aliases": UNET_TARGETS,
}

CASES = (
    Case(
        name="sdxl",
        layouts=layouts(),
        rows=rows,
        parameters=PARAMETERS,
        published=published,
        **COMMON,
    ),
    Case(
        name="sdxl_controlnet",
        layouts=layouts(CONTROLNET),
        rows=rows_with_control,
        parameters={**PARAMETERS, **CONTROL},
        published=published_control,
        **COMMON,
    ),
)
