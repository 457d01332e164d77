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
"""Frames per second of what the models make: of 16 channels, and of TI2V-5B."""


def encode_prompt(loaded: Loaded, samples: Sequence[Sample]) -> list[Tensors]:
    """Prompt → `prompt_embeds` (L, hidden), L at most 512."""
    prompts = [prompt_clean(sample["prompt"]) for sample in samples]
    tokenizer, encoder = loaded["tokenizer"], loaded["text_encoder"]
    states = encode_unpadded(tokenizer, encoder, prompts, PROMPT_TOKENS)
    return [{"prompt_embeds": own} for own in states]


def encode_video(loaded: Loaded, samples: Sequence[Sample]) -> list[Tensors]:
    """Video (3, F, H, W) → `video` (C, F', H', W').

    With VACE's reference image its latent frame comes first, as in the sequences that VACE was
    trained on; the published pipeline denoises that frame with the others and then drops it.
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
        last: the last frame is given as well as the first.
    """
    encode = partial(encode_standardised, loaded["vae"])
    given = encode_given(stacked(samples, "video"), _given(last), FRAMES_PER_LATENT, encode)
    return [{"given_frames": own} for own in given]


def encode_features(loaded: Loaded, samples: Sequence[Sample], last: bool = False) -> list[Tensors]:
    """Video (3, F, H, W) → `features` (N, 257, hidden): CLIP's penultimate hidden states of the
    first frame, and of the last one where it is given (N = 2)."""
    shown = (sample["video"][:, list(_given(last))].transpose(0, 1) for sample in samples)
    return [{"features": penultimate_states(loaded["image_encoder"], each)} for each in shown]


def _given(last: bool) -> tuple[int, ...]:
    """The frames of a video that are given."""
    return (0, -1) if last else (0,)


def encode_control(loaded: Loaded, samples: Sequence[Sample]) -> list[Tensors]:
    """What VACE's blocks see → `vace` (2 C + 64, F', H', W').

    Latents of what stays (nothing: grey), of what is to be changed (`vace_video`, else grey),
    and a mask of 8x8 pixels to a latent that says "change" everywhere. The latent frame of a
    reference image comes first; there the mask is 0.
    """
    vae = loaded["vae"]
    given = "vace_video" in samples[0]
    shown = stacked(samples, "vace_video" if given else "video")
    shown = shown if given else torch.zeros_like(shown)
    latents = torch.cat(
        [encode_standardised(vae, torch.zeros_like(shown)), encode_standardised(vae, shown)], dim=1
    )
    mask = latents.new_ones(len(latents), 8 * 8, *latents.shape[2:])
    control = torch.cat([latents, mask], dim=1)
    if "vace_reference_image" in samples[0]:
        reference = encode_standardised(vae, stacked(samples, "vace_reference_image").unsqueeze(2))
        rest = control.shape[1] - reference.shape[1]
        padded = functional.pad(reference, (0, 0, 0, 0, 0, 0, 0, rest))
        control = torch.cat([padded, control], dim=2)
    return [{"vace": tensor} for tensor in control]


def full_length(embeds: torch.Tensor) -> torch.Tensor:
    """Prompts (B, L, hidden), zero behind their ends → (B, 512, hidden)."""
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
        # A timestep for each token: 0 where the latents are given.
        left = 1 - conditions["first_frame"].to(t).expand_as(latents[:, :1])
        t = (left[:, 0, :, ::PATCH, ::PATCH] * t.view(-1, 1, 1, 1)).flatten(1)
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
    """Latent frames of what is made, without that of a reference image."""
    return 1 + (request.num_frames - 1) // FRAMES_PER_LATENT


def shapes(loaded: Loaded, request: SampleRequest) -> dict[str, tuple[int, ...]]:
    """The latents of `video`: see `Sampling.shapes`. VACE's reference has a frame before them."""
    config: Any = loaded["vae"].config
    factor: int = config.scale_factor_spatial
    control = request.conditions.get("vace")
    frames = _latent_frames(request) if control is None else control.shape[2]
    return {"video": (config.z_dim, frames, request.height // factor, request.width // factor)}


def decode(loaded: Loaded, request: SampleRequest, latents: Tensors) -> list[Clip]:
    """Videos: see `Sampling.decode`."""
    video = latents["video"][:, :, -_latent_frames(request) :]
    made = decode_standardised(loaded["vae"], video)
    rate = request.frame_rate or (WIDE_RATE if video.shape[1] == WIDE_LATENTS else RATE)
    return [Clip(pictures(each.transpose(0, 1)), rate) for each in made]
