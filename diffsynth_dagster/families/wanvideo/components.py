"""The components of Wan: how to recognise their files, and their settings from shapes."""

from dataclasses import replace
from functools import partial

from diffusers import WanPipeline, WanTransformer3DModel, WanVACETransformer3DModel

from diffsynth_dagster.families.contract import (
    Component,
    ComponentNames,
    Construction,
    Recognition,
    Settings,
    Shapes,
)
from diffsynth_dagster.families.lora import LoraRules
from diffsynth_dagster.families.shared.architecture import count_blocks
from diffsynth_dagster.families.shared.pipeline import load_into_transformer
from diffsynth_dagster.families.shared.t5 import umt5_encoder
from diffsynth_dagster.families.shared.vision_tower import vision_tower
from diffsynth_dagster.families.shared.wan_vae import WAN_VAE
from diffsynth_dagster.families.wanvideo.names import NAMES, convert_dit, lora_aliases

PATCH = 2  # the sides of a token's patch, in latents
HEAD = 128  # channels of an attention head in every published size; no shape shows them


def dit_settings(shapes: Shapes) -> Settings:
    """The settings of the transformer, with VACE blocks if the files have any."""
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
        # VACE blocks belong to evenly spaced layers. The division is rounded up.
        settings["vace_layers"] = list(range(0, layers, -(-layers // vace)))
        # Latents of the controlled and of the free part, and a mask of 8x8 pixels per latent.
        settings["vace_in_channels"] = 2 * in_channels + 64
    return settings


_LORA = LoraRules(
    "transformer",
    partial(load_into_transformer, WanPipeline),
    targets=("q", "k", "v", "o", "ffn.0", "ffn.2"),
    aliases=lora_aliases("blocks"),
    authors=NAMES,
    guide=NAMES,
    folds=True,  # diffusers reads the alphas of the self-attention layers only
)
_DIT = Component(
    name="dit",
    recognition=Recognition(
        signatures=(
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
        checkpoint_prefixes=("model.",),  # in krea-realtime-video
        original_globs=(
            *("diffusion_pytorch_model*", "high_noise_model/*", "low_noise_model/*"),
            "krea-realtime-video-*",
        ),
    ),
    construction=Construction(
        kind=WanTransformer3DModel,
        other_kinds={"vace_blocks.": WanVACETransformer3DModel},
        settings=dit_settings,
        convert=convert_dit,
    ),
    names=ComponentNames(folder="transformer", lora=_LORA),
)
VACE_LORA = replace(_LORA, aliases=lora_aliases("vace_blocks"))

COMPONENTS = (
    _DIT,
    # The low-noise expert of Wan2.2 A14B. Its tensors look like those of `dit`; its path tells.
    replace(
        _DIT,
        name="dit2",
        recognition=replace(
            _DIT.recognition,
            checkpoint_prefixes=(),
            original_globs=("low_noise_model/*",),
            path_marks=("low_noise", "transformer_2"),
        ),
        names=ComponentNames(folder="transformer_2", lora=_LORA),
    ),
    umt5_encoder("text_encoder"),
    WAN_VAE,
    vision_tower("image_encoder"),
)
