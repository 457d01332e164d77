"""Stable Diffusion XL (Podell et al. 2023, arXiv:2307.01952): text to image, and ControlNets.

Reads the diffusers folders, or a whole checkpoint such as `sd_xl_base_1.0.safetensors`.
"""

from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from diffusers import AutoencoderKL, StableDiffusionXLPipeline

from diffsynth_dagster.config.parameters import TrainingConfig
from diffsynth_dagster.data.columns import Input
from diffsynth_dagster.data.geometry import Geometry
from diffsynth_dagster.families.contract import (
    Clip,
    Denoiser,
    Family,
    Loaded,
    Output,
    Sample,
    SampleRequest,
    Sampling,
    Shapes,
    Stage,
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
from diffsynth_dagster.families.shared.stages import PROMPT, image_stage, prompt_stage

NAME = "Stable Diffusion XL"
REPOSITORY = "stabilityai/stable-diffusion-xl-base-1.0"
EMBEDS = ("prompt_embeds", "prompt_embeds_2")
SIZES = Input("image_sizes", "sizes")


def encode_prompt(loaded: Loaded, samples: Sequence[Sample], chunks: int = 1) -> list[Tensors]:
    """Prompt → the first CLIP's `prompt_embeds` (77 n, hidden) of n chunks, at most `chunks`."""
    embeds, _, _ = encode_chunks(loaded, samples, "tokenizer", "text_encoder", True, chunks)
    return [{"prompt_embeds": sample_embeds} for sample_embeds in embeds]


def encode_prompt_2(loaded: Loaded, samples: Sequence[Sample], chunks: int = 1) -> list[Tensors]:
    """Prompt → the second CLIP's `prompt_embeds_2` (77 n, hidden), and the `pooled_prompt_embeds`
    (projection,) of the first chunk."""
    embeds, outputs, first = encode_chunks(
        loaded, samples, "tokenizer_2", "text_encoder_2", True, chunks
    )
    pairs = zip(embeds, outputs.text_embeds[first], strict=True)
    return [{"prompt_embeds_2": states, "pooled_prompt_embeds": pooled} for states, pooled in pairs]


def encode_pixels(vae: AutoencoderKL, pixels: torch.Tensor) -> torch.Tensor:
    """Images (B, 3, H, W) → latents (B, C, H/8, W/8). Computed in float32 if the VAE would overflow
    in float16, as the published one does."""
    with _upcast(vae):
        return encode_scaled(vae, pixels)


@contextmanager
def _upcast(vae: AutoencoderKL) -> Generator[None]:
    """Run the VAE in float32 if it would overflow in float16, even inside an autocast.

    The VAE stays in float32 afterwards.
    """
    config: Any = vae.config
    if config.force_upcast and vae.dtype == torch.float16:
        vae.float()
    # Without this, an autocast to float16 around the call would bring the overflow back.
    is_float32 = vae.dtype == torch.float32
    with torch.autocast(vae.device.type, enabled=False) if is_float32 else nullcontext():
        yield


def encode_sizes(loaded: Loaded, samples: Sequence[Sample]) -> list[Tensors]:
    """The size facts of a sample → `time_ids` (6,), integers."""
    # Integers, because a cast of all conditions to bfloat16 would round sizes above 256.
    return [{"time_ids": torch.tensor(sample[SIZES.column])} for sample in samples]


def _both(embeds: Tensors) -> torch.Tensor:
    """The embeddings of both encoders, concatenated per token (B, 77 n, hidden + hidden)."""
    return torch.cat(of_one_length(embeds, *EMBEDS), dim=-1)


def denoise(
    model: Any, loaded: Loaded, conditions: Tensors, x_t: Tensors, t: torch.Tensor
) -> Tensors:
    """The UNet's prediction for `image` (B, C, H/8, W/8) at timesteps t (B,) in [0, 1000]."""
    pooled, sizes = conditions["pooled_prompt_embeds"], conditions["time_ids"]
    call: dict[str, Any] = {
        "timestep": t,
        "encoder_hidden_states": _both(conditions),
        "added_cond_kwargs": {"text_embeds": pooled, "time_ids": sizes},
    }
    # Empty without a ControlNet.
    residuals = controlnet.residuals(loaded, conditions, x_t["image"], **call)
    return {"image": model(x_t["image"], **call, **residuals).sample}


def decode(loaded: Loaded, request: SampleRequest, latents: Tensors) -> list[Clip]:
    """Decode images, in float32 if the VAE would overflow in float16: see `encode_pixels`."""
    with _upcast(loaded["vae"]):
        return decode_images(loaded, request, latents)


def unprompted(conditions: Tensors) -> Tensors:
    """The conditions of the empty prompt, with its embeddings replaced by zeros.

    The model was trained this way, and the published pipeline does the same.
    """
    embeds = (*EMBEDS, "pooled_prompt_embeds")
    return {n: torch.zeros_like(t) if n in embeds else t for n, t in conditions.items()}


def _encoder_lora(folder: str, kohya_prefix: str, projected: bool = False) -> LoraRules:
    """The LoRA rules of a text encoder: see `clip.lora`."""
    load = partial(kohya.load_text_encoder, StableDiffusionXLPipeline, folder)
    rules = clip.lora(folder, load, (kohya_prefix,), projected)
    return replace(rules, native="kohya")


def variant(family: Family, config: TrainingConfig, given: Mapping[str, Shapes]) -> Family:
    """Stable Diffusion XL, with a control image and caption chunks if the config asks for them."""
    return with_chunks(controlnet.with_control(family, config, given), config, EMBEDS)


FAMILY = Family(
    name="stable_diffusion_xl",
    components=(
        unet.unet(
            ("add_embedding.linear_1.weight", "label_emb.0.0.weight"),
            lora=LoraRules(
                "unet",
                partial(kohya.load_unet, StableDiffusionXLPipeline),
                targets=unet.LORA_TARGETS,
                authors=kohya.UNET,
                # The format that most tools read for this family.
                native="kohya",
                read_by_guide=("guide", "kohya"),
            ),
        ),
        # Listed before `text_encoder`, whose tensor names are a subset of this one's.
        clip.projected_text_encoder(
            "text_encoder_2",
            "conditioner.embedders.1.model.",  # in whole checkpoints
            lora=_encoder_lora("text_encoder_2", "lora_te2_", projected=True),
        ),
        clip.clip_text_encoder(
            "conditioner.embedders.0.transformer.",
            lora=_encoder_lora("text_encoder", "lora_te1_"),
        ),
        image_vae(scaling_factor=0.13025),
        unet.CONTROLNET,
    ),
    tokenizers=(
        clip.clip_tokenizer("tokenizer", "tokenizer_path", f"{REPOSITORY}:tokenizer/"),
        clip.clip_tokenizer("tokenizer_2", "tokenizer_2_path", f"{REPOSITORY}:tokenizer_2/"),
    ),
    stages=(
        prompt_stage(encode_prompt, limit=clip.LIMIT),
        Stage(
            "prompt_2",
            (PROMPT,),
            ("tokenizer_2", "text_encoder_2"),
            (Output("prompt_embeds_2", "condition"), Output("pooled_prompt_embeds", "condition")),
            encode_prompt_2,
        ),
        image_stage(encode_pixels),
        Stage("sizes", (SIZES,), (), (Output("time_ids", "condition"),), encode_sizes),
    ),
    denoisers=(Denoiser("unet"),),
    denoise=denoise,
    noising=diffusion.noising,
    geometry=Geometry(side_factor=32),
    sampling=Sampling(
        image_shapes,
        diffusion.solver,
        decode,
        unprompted=unprompted,
        cfg_scale=5.0,
        distilled=("sdxl-turbo", "sd_xl_turbo", "sdxl-lightning", "sdxl_lightning"),
    ),
    denoise_uses=("controlnet",),
    parameters=(
        "tokenizer_path",
        "tokenizer_2_path",
        "align_to_opensource_format",
        PARAMETER,
        *diffusion.PARAMETERS,
    ),
    extra_inputs=(controlnet.COLUMN,),
    refusals=(
        # The base model reads 768 + 1280 channels, the refiner the second encoder's alone.
        refused_model(
            "unet",
            lambda shapes: unet.cross_attention(shapes) == 1280,
            "the UNet is that of the refiner, which reads one text encoder alone",
            f"give the one of {NAME}'s base model",
        ),
        unet.refuse_inpainting(NAME),
        unet.SAME_LATENTS,
        *controlnet.control_refusals(NAME, told_sizes=True),
    ),
    variant=variant,
    architecture="stable-diffusion-xl-v1-base",
    authors="https://github.com/Stability-AI/generative-models",
    scheduler_marks=diffusion.SCHEDULER_MARKS,
)
