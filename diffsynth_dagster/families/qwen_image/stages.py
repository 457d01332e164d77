"""The stages of Qwen-Image and one call of its transformer: tensors in, tensors out."""

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import AutoencoderKLQwenImage

from diffsynth_dagster.families import sampling_types
from diffsynth_dagster.families.contract import Clip, Loaded, Sample, SampleRequest, Tensors
from diffsynth_dagster.families.limits import TokenLimit
from diffsynth_dagster.families.shared.latents import (
    decode_standardised,
    encode_standardised,
    pictures,
)
from diffsynth_dagster.families.shared.packing import grid_of, pack, unpack
from diffsynth_dagster.families.shared.qwen_vl import encode_templated

PROMPT_TEMPLATE = (
    "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, "
    "quantity, text, spatial relationships of the objects and background:<|im_end|>\n"
    "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
)
MAX_PROMPT_TOKENS = 1024
PROMPT_LIMIT = TokenLimit(
    "tokenizer", MAX_PROMPT_TOKENS, PROMPT_TEMPLATE.format, PROMPT_TEMPLATE.split("{}")[0]
)


def encode_prompt(loaded: Loaded, samples: Sequence[Sample]) -> list[Tensors]:
    """Prompt → `prompt_embeds` (L, hidden): the last hidden states after the template's prefix."""
    prompts = [sample["prompt"] for sample in samples]
    states = encode_templated(loaded, prompts, PROMPT_TEMPLATE, MAX_PROMPT_TOKENS)
    return [{"prompt_embeds": embeds} for embeds in states]


def encode_pixels(vae: AutoencoderKLQwenImage, pixels: torch.Tensor) -> torch.Tensor:
    """Images (B, 3, H, W) in [-1, 1] → latents (B, C, H/8, W/8) float32. The VAE is a video VAE, so
    an image is encoded as a video of one frame."""
    return encode_standardised(vae, pixels.unsqueeze(2)).squeeze(2)


def denoise(
    dit: Any, loaded: Loaded, conditions: Tensors, x_t: Tensors, t: torch.Tensor
) -> Tensors:
    """The transformer's velocity for `image` (B, C, H, W) at timesteps t (B,) in [0, 1000]."""
    latents = x_t["image"]
    height, width = latents.shape[-2:]
    tokens = pack(latents)
    count = tokens.shape[1]
    grids = [(1, *grid_of(latents))]
    if "edit_tokens" in conditions:
        # The edit images follow the trained image in the sequence.
        tokens = torch.cat([tokens, conditions["edit_tokens"]], dim=1)
        # Samples of a batch have equal shapes: the grids of one fit all.
        grids += [(1, rows, columns) for rows, columns in conditions["edit_grids"][0].tolist()]
    mask = conditions["prompt_embeds_mask"]
    predicted = dit(
        hidden_states=tokens,
        encoder_hidden_states=conditions["prompt_embeds"],
        # As in the published pipeline: without padding, attention is faster without a mask.
        encoder_hidden_states_mask=None if mask.all() else mask,
        timestep=t / 1000,  # the transformer multiplies it by 1000 again
        img_shapes=[grids] * len(latents),
        return_dict=False,
    )[0]
    return {"image": unpack(predicted[:, :count], height, width)}


def shapes(loaded: Loaded, request: SampleRequest) -> dict[str, tuple[int, ...]]:
    """The shape of `image` latents: see `Sampling.shapes`."""
    config: Any = loaded["vae"].config
    factor = 2 ** len(config.temperal_downsample)
    return {"image": (config.z_dim, request.height // factor, request.width // factor)}


def decode(loaded: Loaded, request: SampleRequest, latents: Tensors) -> list[Clip]:
    """Decode images: see `Sampling.decode`."""
    pixels = decode_standardised(loaded["vae"], latents["image"].unsqueeze(2))
    return [Clip([image]) for image in pictures(pixels[:, :, 0])]


def guide(prompted: Tensors, unprompted: Tensors, scale: float) -> Tensors:
    """Classifier-free guidance that keeps the norm of each token of the prompted prediction, as the
    published pipelines do."""
    prediction = prompted["image"]
    guided = pack(sampling_types.guide(prompted, unprompted, scale)["image"])
    norm = pack(prediction).norm(dim=-1, keepdim=True)
    tokens = guided * (norm / guided.norm(dim=-1, keepdim=True))
    return {"image": unpack(tokens, *prediction.shape[-2:])}
