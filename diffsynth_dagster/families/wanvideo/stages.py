"""The stages of Wan and one call of its transformer: tensors in, tensors out."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from diffusers.pipelines.wan.pipeline_wan import prompt_clean
from torch.nn import functional

from diffsynth_dagster.families.contract import Clip, Loaded, Sample, SampleRequest, Tensors
from diffsynth_dagster.families.limits import TokenLimit
from diffsynth_dagster.families.shared.frames import encode_given
from diffsynth_dagster.families.shared.latents import (
    decode_standardised,
    encode_standardised,
    pictures,
    stacked,
)
from diffsynth_dagster.families.shared.t5 import encode_unpadded
from diffsynth_dagster.families.shared.vision_tower import penultimate_states
from diffsynth_dagster.families.shared.wan_vae import WIDE_LATENTS
from diffsynth_dagster.families.wanvideo.components import PATCH

PROMPT_TOKENS = 512
PROMPT_LIMIT = TokenLimit("tokenizer", PROMPT_TOKENS, prompt_clean)
FRAMES_PER_LATENT = 4
RATE, WIDE_RATE = 16.0, 24.0
"""Frames per second of the videos of the models with 16 latent channels, and of TI2V-5B."""


def encode_prompt(loaded: Loaded, samples: Sequence[Sample]) -> list[Tensors]:
    """Prompt → `prompt_embeds` (L, hidden), L at most 512."""
    prompts = [prompt_clean(sample["prompt"]) for sample in samples]
    tokenizer, encoder = loaded["tokenizer"], loaded["text_encoder"]
    states = encode_unpadded(tokenizer, encoder, prompts, PROMPT_TOKENS)
    return [{"prompt_embeds": embeds} for embeds in states]


def encode_video(loaded: Loaded, samples: Sequence[Sample]) -> list[Tensors]:
    """Video (3, F, H, W) → `video` (C, F', H', W').

    If there is a VACE reference image, its latent frame comes first, as in the sequences that VACE
    was trained on. The published pipeline denoises this frame with the others and then drops it.
    """
    latents = encode_standardised(loaded["vae"], stacked(samples, "video"))
    if "vace_reference_image" in samples[0]:
        reference = stacked(samples, "vace_reference_image").unsqueeze(2)
        latents = torch.cat([encode_standardised(loaded["vae"], reference), latents], dim=2)
    return [{"video": latent} for latent in latents]


def encode_given_frames(
    loaded: Loaded, samples: Sequence[Sample], last: bool = False
) -> list[Tensors]:
    """Video (3, F, H, W) → `given_frames` (4 + C, F', H', W'): see `encode_given`.

    Args:
        last: whether the last frame is given in addition to the first.
    """
    encode = partial(encode_standardised, loaded["vae"])
    given = encode_given(stacked(samples, "video"), _given_indices(last), FRAMES_PER_LATENT, encode)
    return [{"given_frames": frames} for frames in given]


def encode_features(loaded: Loaded, samples: Sequence[Sample], last: bool = False) -> list[Tensors]:
    """Video (3, F, H, W) → `features` (N, 257, hidden): CLIP's penultimate hidden states of the
    first frame, and of the last one if it is given (N = 2)."""
    given = (sample["video"][:, list(_given_indices(last))].transpose(0, 1) for sample in samples)
    return [{"features": penultimate_states(loaded["image_encoder"], frames)} for frames in given]


def _given_indices(last: bool) -> tuple[int, ...]:
    """The indices of the given frames of a video."""
    return (0, -1) if last else (0,)


def encode_control(loaded: Loaded, samples: Sequence[Sample]) -> list[Tensors]:
    """The control video → `vace` (2 C + 64, F', H', W'), the input of VACE's blocks.

    The channels are, in order: latents of the part to keep (grey: nothing is kept), latents of the
    part to change (`vace_video`, or grey without one), and the mask of the part to change (all
    ones), with 8x8 pixels for each latent. If there is a reference image, its latent frame comes
    first, with a mask of 0.
    """
    vae = loaded["vae"]
    given = "vace_video" in samples[0]
    # Without a control video, `video` still gives the size.
    video = stacked(samples, "vace_video" if given else "video")
    grey = torch.zeros_like(video)
    video = video if given else grey
    latents = torch.cat([encode_standardised(vae, grey), encode_standardised(vae, video)], dim=1)
    mask = latents.new_ones(len(latents), 8 * 8, *latents.shape[2:])
    control = torch.cat([latents, mask], dim=1)
    if "vace_reference_image" in samples[0]:
        reference = encode_standardised(vae, stacked(samples, "vace_reference_image").unsqueeze(2))
        # The reference is a part to keep: zeros in the other channels and in the mask.
        rest = control.shape[1] - reference.shape[1]
        padded = functional.pad(reference, (0, 0, 0, 0, 0, 0, 0, rest))
        control = torch.cat([padded, control], dim=2)
    return [{"vace": tensor} for tensor in control]


def full_length(embeds: torch.Tensor) -> torch.Tensor:
    """Pad prompt embeddings (B, L, hidden) with zeros to the trained length (B, 512, hidden)."""
    return functional.pad(embeds, (0, 0, 0, PROMPT_TOKENS - embeds.shape[1]))


def denoise(
    dit: Any, loaded: Loaded, conditions: Tensors, x_t: Tensors, t: torch.Tensor
) -> Tensors:
    """The transformer's velocity for `video` (B, C, F', H', W') at timesteps t (B,) in
    [0, 1000]."""
    latents = x_t["video"]
    options: dict[str, torch.Tensor] = {}
    if "features" in conditions:
        options["encoder_hidden_states_image"] = conditions["features"].flatten(0, 1)
    if "vace" in conditions:
        options["control_hidden_states"] = conditions["vace"]
    if "first_frame" in conditions:
        # One timestep per token, 0 for given latents. A token is a patch of PATCH x PATCH latents,
        # so taking every PATCH-th one gives the mask of the tokens.
        noisy = 1 - conditions["first_frame"].to(t).expand_as(latents[:, :1])
        t = (noisy[:, 0, :, ::PATCH, ::PATCH] * t.view(-1, 1, 1, 1)).flatten(1)
    if "given_frames" in conditions:
        latents = torch.cat([latents, conditions["given_frames"]], dim=1)
    velocity = dit(
        hidden_states=latents,
        timestep=t,
        encoder_hidden_states=full_length(conditions["prompt_embeds"]),
        return_dict=False,
        **options,
    )[0]
    return {"video": velocity}


def _latent_frames(request: SampleRequest) -> int:
    """The number of latent frames of the video, without a reference image's."""
    return 1 + (request.num_frames - 1) // FRAMES_PER_LATENT


def shapes(loaded: Loaded, request: SampleRequest) -> dict[str, tuple[int, ...]]:
    """The shape of `video` latents: see `Sampling.shapes`. A VACE reference image adds a frame."""
    config: Any = loaded["vae"].config
    factor: int = config.scale_factor_spatial
    control = request.conditions.get("vace")
    frames = _latent_frames(request) if control is None else control.shape[2]
    return {"video": (config.z_dim, frames, request.height // factor, request.width // factor)}


def decode(loaded: Loaded, request: SampleRequest, latents: Tensors) -> list[Clip]:
    """Decode videos: see `Sampling.decode`."""
    # Drops the latent frame of a VACE reference image, which comes first.
    video = latents["video"][:, :, -_latent_frames(request) :]
    decoded = decode_standardised(loaded["vae"], video)
    rate = request.frame_rate or (WIDE_RATE if video.shape[1] == WIDE_LATENTS else RATE)
    return [Clip(pictures(frames.transpose(0, 1)), rate) for frames in decoded]
