"""Stable Diffusion 1.5 (Rombach et al. 2022, arXiv:2112.10752): text to image, and ControlNets.

Reads the diffusers folders, or a whole checkpoint such as `v1-5-pruned-emaonly.safetensors`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from diffusers import StableDiffusionPipeline

from diffsynth_dagster.config.parameters import TrainingConfig
from diffsynth_dagster.data.geometry import Geometry
from diffsynth_dagster.families.contract import (
    Denoiser,
    Family,
    Loaded,
    Sample,
    Sampling,
    Shapes,
    Tensors,
)
from diffsynth_dagster.families.lora import LoraRules
from diffsynth_dagster.families.requirements import refused_model
from diffsynth_dagster.families.shared import clip, controlnet, diffusion, kohya, unet
from diffsynth_dagster.families.shared.chunks import (
    PARAMETER,
    encode_chunks,
    of_one_length,
    with_chunks,
)
from diffsynth_dagster.families.shared.image_vae import image_vae
from diffsynth_dagster.families.shared.latents import (
    decode_images,
    encode_scaled,
    image_shapes,
)
from diffsynth_dagster.families.shared.stages import image_stage, prompt_stage

NAME = "Stable Diffusion 1.5"
REPOSITORY = "AI-ModelScope/stable-diffusion-v1-5"


def encode_prompt(loaded: Loaded, samples: Sequence[Sample], chunks: int = 1) -> list[Tensors]:
    """Prompt → CLIP's `prompt_embeds` (77 n, hidden) of n chunks, at most `chunks`."""
    embeds, _, _ = encode_chunks(loaded, samples, "tokenizer", "text_encoder", False, chunks)
    return [{"prompt_embeds": sample_embeds} for sample_embeds in embeds]


def denoise(
    model: Any, loaded: Loaded, conditions: Tensors, x_t: Tensors, t: torch.Tensor
) -> Tensors:
    """The UNet's prediction for `image` (B, C, H/8, W/8) at timesteps t (B,) in [0, 1000]."""
    (embeds,) = of_one_length(conditions, "prompt_embeds")
    call = {"timestep": t, "encoder_hidden_states": embeds}
    # Empty without a ControlNet.
    residuals = controlnet.residuals(loaded, conditions, x_t["image"], **call)
    return {"image": model(x_t["image"], **call, **residuals).sample}


def variant(family: Family, config: TrainingConfig, given: Mapping[str, Shapes]) -> Family:
    """Stable Diffusion 1.5, with a control image and caption chunks if the config asks for them."""
    return with_chunks(controlnet.with_control(family, config, given), config, ("prompt_embeds",))


FAMILY = Family(
    name="stable_diffusion",
    components=(
        # The mark tells it from Stable Diffusion XL, which has no attention in its first level.
        unet.unet(
            (
                "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight",
                "input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight",
            ),
            lora=LoraRules(
                "unet",
                partial(kohya.load_unet, StableDiffusionPipeline),
                targets=unet.LORA_TARGETS,
                authors=kohya.UNET,
                kohya_names=kohya.UNET_OF_DIFFUSERS,
                # DiffSynth-Studio reads its own format only for this family.
                native="guide",
                exports=("diffusers", "kohya"),
                read_by_guide=("guide",),
            ),
        ),
        clip.clip_text_encoder(
            "cond_stage_model.transformer.",
            lora=replace(
                clip.lora(
                    "text_encoder",
                    partial(kohya.load_text_encoder, StableDiffusionPipeline, "text_encoder"),
                    ("lora_te_", "lora_te1_"),
                ),
                native="guide",
                exports=("diffusers", "kohya"),
                read_by_guide=("guide",),
            ),
        ),
        image_vae(scaling_factor=0.18215),
        unet.CONTROLNET,
    ),
    tokenizers=(clip.clip_tokenizer("tokenizer", "tokenizer_path", f"{REPOSITORY}:tokenizer/"),),
    stages=(prompt_stage(encode_prompt, limit=clip.LIMIT), image_stage(encode_scaled)),
    denoisers=(Denoiser("unet"),),
    denoise=denoise,
    noising=diffusion.noising,
    geometry=Geometry(side_factor=32, sample_size=(512, 512)),
    sampling=Sampling(image_shapes, diffusion.solver, decode_images, cfg_scale=7.5),
    denoise_uses=("controlnet",),
    parameters=("tokenizer_path", "align_to_opensource_format", PARAMETER, *diffusion.PARAMETERS),
    extra_inputs=(controlnet.COLUMN,),
    refusals=(
        # The tensors of Stable Diffusion 2 have the same names. Only widths tell it apart.
        refused_model(
            "unet",
            lambda shapes: unet.cross_attention(shapes) == 1024,
            "the UNet is that of Stable Diffusion 2, which is not supported",
            f"give one of {NAME}",
        ),
        refused_model(
            "text_encoder",
            lambda shapes: shapes["embeddings.token_embedding.weight"][1] in (1024, 1280),
            "the text encoder is that of Stable Diffusion 2, or the second one of XL",
            f"give the one of {NAME}",
        ),
        unet.refuse_inpainting(NAME),
        unet.SAME_LATENTS,
        *controlnet.control_refusals(NAME, told_sizes=False),
    ),
    variant=variant,
    architecture="stable-diffusion-v1",
    authors="https://github.com/Stability-AI/generative-models",
    scheduler_marks=diffusion.SCHEDULER_MARKS,
)
