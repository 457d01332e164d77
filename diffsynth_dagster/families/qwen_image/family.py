"""Qwen-Image (Wu et al. 2025, arXiv:2508.02324): text to image, and with `edit_image` editing.

Files are those of the repositories Qwen/Qwen-Image, -2512, and -Edit, -Edit-2509, -Edit-2511.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, QwenImagePipeline
from PIL import Image
from transformers import Qwen2Tokenizer

from diffsynth_dagster.config.parameters import TrainingConfig
from diffsynth_dagster.data.columns import Input
from diffsynth_dagster.data.geometry import Geometry
from diffsynth_dagster.errors import ParameterError
from diffsynth_dagster.families.contract import (
    Family,
    Loaded,
    Output,
    Sample,
    SampleRequest,
    Shapes,
    Stage,
    Tensors,
    Tokenizer,
)
from diffsynth_dagster.families.qwen_image.edit import COLUMN, edited
from diffsynth_dagster.families.qwen_image.modules import COMPONENTS, encode_pixels
from diffsynth_dagster.families.shared.support import (
    PATCH,
    load_into_transformer,
    pack,
    published_sigmas,
    unpack,
)
from diffsynth_dagster.objective.flow import (
    FlowPath,
    exponential_shift,
    flow_path,
    linear_sigmas,
    stretch_to,
)

PROMPT_TEMPLATE = (
    "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, "
    "quantity, text, spatial relationships of the objects and background:<|im_end|>\n"
    "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
)
MAX_PROMPT_TOKENS = 1024
SCHEDULER = {
    "base_image_seq_len": 256,
    "base_shift": 0.5,
    "max_image_seq_len": 8192,
    "max_shift": 0.9,
    "num_train_timesteps": 1000,
    "shift": 1.0,
    "shift_terminal": 0.02,
    "time_shift_type": "exponential",
    "use_dynamic_shifting": True,
}
TRAINING_MU = 0.8

LORA_TARGETS = (
    "to_q,to_k,to_v,add_q_proj,add_k_proj,add_v_proj,to_out.0,to_add_out,"
    "img_mlp.net.2,img_mod.1,txt_mlp.net.2,txt_mod.1"
)


def encode_prompt(loaded: Loaded, samples: Sequence[Sample]) -> list[Tensors]:
    """Prompt → `prompt_embeds` (L, hidden): the last hidden states after the template's prefix.

    Prompts of equal token count share a forward pass, so that none is padded. The number of
    template tokens to drop is counted with the tokenizer.
    """
    tokenizer, encoder = loaded["tokenizer"], loaded["text_encoder"]
    drop = len(tokenizer(PROMPT_TEMPLATE.split("{}")[0]).input_ids)
    rows = [
        tokenizer(
            PROMPT_TEMPLATE.format(sample["prompt"]),
            truncation=True,
            max_length=MAX_PROMPT_TOKENS + drop,
        ).input_ids
        for sample in samples
    ]
    results: dict[int, Tensors] = {}
    for length in sorted({len(row) for row in rows}):
        members = [index for index, row in enumerate(rows) if len(row) == length]
        ids = torch.tensor([rows[index] for index in members], device=encoder.device)
        hidden = encoder.model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
        for index, states in zip(members, hidden.last_hidden_state, strict=True):
            results[index] = {"prompt_embeds": states[drop:]}
    return [results[index] for index in range(len(samples))]


def encode_image(loaded: Loaded, samples: Sequence[Sample]) -> list[Tensors]:
    """Image (3, H, W) → `image` (C, H/8, W/8): its latents."""
    pixels = torch.stack([sample["image"] for sample in samples])
    return [{"image": latent} for latent in encode_pixels(loaded["vae"], pixels)]


def denoise(loaded: Loaded, conditions: Tensors, x_t: Tensors, t: torch.Tensor) -> Tensors:
    """The transformer's velocity for `image` (B, C, H, W) at timesteps t (B,) in [0, 1000].

    The tokens of edit images stand behind those of the image.
    """
    latents = x_t["image"]
    height, width = latents.shape[-2:]
    tokens = pack(latents)
    count = tokens.shape[1]
    grids = [(1, height // PATCH, width // PATCH)]
    if "edit_tokens" in conditions:
        tokens = torch.cat([tokens, conditions["edit_tokens"]], dim=1)
        # Samples of a batch are of equal shape: the grids of one are those of all.
        grids += [(1, rows, columns) for rows, columns in conditions["edit_grids"][0].tolist()]
    mask = conditions["prompt_embeds_mask"]
    predicted = loaded["dit"](
        hidden_states=tokens,
        encoder_hidden_states=conditions["prompt_embeds"],
        # As in the published pipeline: without padding, attention is faster without a mask.
        encoder_hidden_states_mask=None if mask.all() else mask,
        timestep=t / 1000,
        img_shapes=[grids] * len(latents),
        return_dict=False,
    )[0]
    return {"image": unpack(predicted[:, :count], height, width)}


def path() -> FlowPath:
    """Exponential shift with mu = 0.8, stretched so that the last sigma is 0.02."""
    sigmas = stretch_to(exponential_shift(linear_sigmas(), TRAINING_MU), 0.02)
    return flow_path(sigmas, f"flow matching, exponential shift mu={TRAINING_MU}, terminal 0.02")


def sample(loaded: Loaded, request: SampleRequest) -> list[list[Image.Image]]:
    """Images by diffusers' own pipeline."""
    make: Any = QwenImagePipeline  # takes None where the prompts are already encoded
    # A single step has nothing to stretch to the terminal sigma: diffusers divides by zero.
    alone = {"shift_terminal": None} if request.num_inference_steps == 1 else {}
    pipeline = make(
        scheduler=FlowMatchEulerDiscreteScheduler.from_config({**SCHEDULER, **alone}),
        vae=loaded["vae"],
        text_encoder=None,
        tokenizer=None,
        transformer=loaded["dit"],
    )
    pipeline.set_progress_bar_config(disable=True)
    negative: dict[str, Any] = {}
    if request.negative is not None:
        negative = {
            "negative_prompt_embeds": request.negative["prompt_embeds"],
            "negative_prompt_embeds_mask": request.negative["prompt_embeds_mask"],
        }
    images = pipeline(
        prompt_embeds=request.conditions["prompt_embeds"],
        prompt_embeds_mask=request.conditions["prompt_embeds_mask"],
        true_cfg_scale=request.cfg_scale,
        height=request.height,
        width=request.width,
        num_inference_steps=request.num_inference_steps,
        generator=request.generators,
        max_sequence_length=MAX_PROMPT_TOKENS,
        **negative,
    ).images
    return [[image] for image in images]


def inference_sigmas(steps: int, x_0: Tensors) -> torch.Tensor:
    """The sigmas of the published sampler for the size of `image` (B, C, H, W)."""
    height, width = x_0["image"].shape[-2:]
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(SCHEDULER)
    return published_sigmas(scheduler, steps, height * width // PATCH**2)


def variant(config: TrainingConfig, given: Mapping[str, Shapes]) -> Family:
    """Qwen-Image, or its editing releases where `extra_inputs` names the edit image.

    Raises:
        ParameterError: a parameter is about edit images, but `extra_inputs` does not name them.
    """
    if COLUMN in config.extra_inputs:
        return edited(FAMILY, config)
    without = {
        "data_file_keys": COLUMN in config.data_file_keys,
        "processor_path": config.processor_path is not None,
        "zero_cond_t": config.zero_cond_t,
        "edit_plus": config.edit_plus,
    }
    for name in (name for name, given in without.items() if given):
        raise ParameterError(
            f"{name} is about edit images, which are not trained on",
            where=name,
            do=f"name '{COLUMN}' in extra_inputs and data_file_keys, or in neither",
        )
    return FAMILY


FAMILY = Family(
    name="qwen_image",
    components=COMPONENTS,
    tokenizers=(
        Tokenizer(
            "tokenizer",
            "tokenizer_path",
            "Qwen/Qwen-Image:tokenizer/",
            Qwen2Tokenizer.from_pretrained,
            ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|image_pad|>", "<|vision_end|>"),
        ),
    ),
    stages=(
        Stage(
            "prompt",
            (Input("prompt", "text"),),
            ("tokenizer", "text_encoder"),
            (Output("prompt_embeds", "condition", ragged=True),),
            encode_prompt,
        ),
        Stage(
            "image",
            (Input("image", "image"),),
            ("vae",),
            (Output("image", "target"),),
            encode_image,
        ),
    ),
    denoiser="dit",
    denoise=denoise,
    path=path,
    geometry=Geometry(side_factor=16),
    sample=sample,
    load_lora=partial(load_into_transformer, QwenImagePipeline),
    inference_sigmas=inference_sigmas,
    lora_targets={"dit": tuple(LORA_TARGETS.split(","))},
    parameters=("tokenizer_path", "processor_path", "zero_cond_t", "edit_plus"),
    extra_inputs=(COLUMN,),
    variant=variant,
    repositories=("Qwen/Qwen-Image",),
)
