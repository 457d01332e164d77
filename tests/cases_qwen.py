"""Qwen-Image and its editing variants, tiny."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from conftest import write_images, write_qwen
from diffusers import QwenImagePipeline
from family_case import Case, first_call

from diffsynth_dagster.families.contract import Tensors
from diffsynth_dagster.families.support import pack, unpack


def write(folder: Path) -> None:
    write_qwen(folder / "diffusers")


FILES = {
    "model_paths": [
        "diffusers/transformer/diffusion_pytorch_model.safetensors",
        "diffusers/text_encoder/model.safetensors",
        "diffusers/vae/diffusion_pytorch_model.safetensors",
    ],
    "tokenizer_path": "diffusers/tokenizer",
}


def rows(folder: Path) -> Path:
    return write_images(folder, 4) / "metadata.csv"


def published(
    folder: Path, row: Mapping[str, Any], x_t: Tensors, lora: Path | None
) -> tuple[Tensors, float]:
    from diffusers import (
        AutoencoderKLQwenImage,
        FlowMatchEulerDiscreteScheduler,
        QwenImageTransformer2DModel,
    )
    from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer

    from diffsynth_dagster.families.qwen_image import SCHEDULER

    own = folder / "diffusers"
    pipeline = QwenImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler.from_config(SCHEDULER),
        vae=AutoencoderKLQwenImage.from_pretrained(own / "vae"),
        text_encoder=Qwen2_5_VLForConditionalGeneration.from_pretrained(own / "text_encoder"),
        tokenizer=Qwen2Tokenizer.from_pretrained(own / "tokenizer"),
        transformer=QwenImageTransformer2DModel.from_pretrained(own / "transformer"),
    )
    if lora is not None:
        pipeline.load_lora_weights(lora)
    # The number of template tokens is that of the published tokenizer; ours is tiny.
    from diffsynth_dagster.families.qwen_image import PROMPT_TEMPLATE

    start = PROMPT_TEMPLATE.split("{}")[0]
    pipeline.prompt_template_encode_start_idx = len(pipeline.tokenizer(start).input_ids)
    latents = x_t["image"]
    height, width = latents.shape[-2:]
    pipeline.set_progress_bar_config(disable=True)
    with first_call(pipeline.transformer) as seen, torch.no_grad():
        pipeline(
            prompt=row["prompt"],
            latents=pack(latents[None]),
            height=height * 8,
            width=width * 8,
            num_inference_steps=2,
            true_cfg_scale=1.0,
            output_type="latent",
        )
    timestep = float(seen["kwargs"]["timestep"][0]) * 1000
    return {"image": unpack(seen["output"][:, : height * width // 4], height, width)[0]}, timestep


CASES = (
    Case(
        name="qwen_image",
        family="qwen_image",
        write=write,
        layouts={"diffusers": FILES},
        rows=rows,
        parameters={"height": 32, "width": 32},
        targets=("to_q", "to_v"),
        aliases=("to_q", "to_v"),
        published=published,
    ),
)
