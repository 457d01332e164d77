"""The stages of LTX-2 and one call of its transformer: tensors in, tensors out."""

from collections.abc import Sequence
from typing import Any

import torch

from diffsynth_dagster.families.contract import Clip, Loaded, Sample, SampleRequest, Tensors
from diffsynth_dagster.families.shared.frames import compressed
from diffsynth_dagster.families.shared.latents import pictures, stacked
from diffsynth_dagster.families.shared.ltx_vae import (
    HOP,
    MEL_BINS,
    SOUND_RATE,
    decode_clips,
    decode_sound,
    encode_clips,
)

FRAME_RATE, FRAMES_PER_LATENT = 24.0, 8
CONTEXT, FACTOR, RATE = "in_context_videos", "in_context_downsample_factor", "frame_rate"


def encode_from_compressed(loaded: Loaded, samples: Sequence[Sample], crf: int) -> list[Tensors]:
    """Video (3, F, H, W) → `video` (C, F', H', W') with a compressed first frame.

    The first latent frame is encoded from the compressed first frame, the others from the original
    video.
    """
    vae, videos = loaded["vae"], stacked(samples, "video")
    first_frames = torch.stack([compressed(video[:, 0], crf) for video in videos])
    latents = encode_clips(vae, videos)
    latents[:, :, :1] = encode_clips(vae, first_frames.unsqueeze(2))
    return [{"video": latent} for latent in latents]


def encode_context(loaded: Loaded, samples: Sequence[Sample]) -> list[Tensors]:
    """N reference videos of a sample → three conditions.

    `context` (L, C) has the tokens of all videos in order, `context_grids` (N, 3) their latent
    frames, rows and columns, and `context_factor` () the number that their sides were divided by.
    """
    # Samples have equal shapes, so their n-th videos have equal sizes and can be stacked.
    by_position = zip(*(sample[CONTEXT] for sample in samples), strict=True)
    latents = [encode_clips(loaded["vae"], torch.stack(videos)) for videos in by_position]
    grids = torch.tensor([list(latent.shape[2:]) for latent in latents])
    tokens = torch.cat([pack(latent) for latent in latents], dim=1)
    return [
        {
            "context": sample_tokens,
            "context_grids": grids,
            "context_factor": torch.tensor(int(sample[FACTOR])),
        }
        for sample_tokens, sample in zip(tokens, samples, strict=True)
    ]


def pack(latents: torch.Tensor) -> torch.Tensor:
    """Latents (B, C, F, H, W) → tokens (B, F H W, C), one for each position."""
    return latents.flatten(2).transpose(1, 2)


def coordinates(
    dit: Any, grid: Sequence[int], frame_rate: float, factor: torch.Tensor
) -> torch.Tensor:
    """The start and end of each token of a clip on three axes, (B, 3, F H W, 2): time in seconds,
    height and width in pixels of the sample.

    Args:
        grid: F, H, W.
        factor: (B,), the number that the clip's sides were divided by.
    """
    batch, (frames, height, width) = len(factor), grid
    # At 1 frame per second diffusers returns the time axis in frames.
    coords = dit.rope.prepare_video_coords(batch, frames, height, width, factor.device, fps=1.0)
    return torch.cat([coords[:, :1] / frame_rate, coords[:, 1:] * factor.view(-1, 1, 1, 1)], dim=1)


def denoise(
    dit: Any,
    loaded: Loaded,
    conditions: Tensors,
    x_t: Tensors,
    t: torch.Tensor,
    frame_rate: float,
) -> Tensors:
    """The transformer's velocity at timesteps t (B,) in [0, 1000]: for `video` (B, C, F, H, W), and
    for `audio` (B, L, C) if the clips have sound.

    Clean tokens (a given first frame, reference videos) have the timestep 0.

    Args:
        frame_rate: frames per second of the clips.
    """
    latents, sound = x_t["video"], x_t.get("audio")
    grid, tokens = latents.shape[2:], pack(latents)
    count, coords = tokens.shape[1], coordinates(dit, grid, frame_rate, torch.ones_like(t))
    # One timestep per token is needed only if some tokens are clean.
    has_clean = "first_frame" in conditions or "context" in conditions
    timestep = t[:, None].expand(-1, count) if has_clean else t
    if "first_frame" in conditions:
        noisy = pack(1 - conditions["first_frame"].to(t).expand_as(latents[:, :1]))[..., 0]
        timestep = timestep * noisy
    if "context" in conditions:
        context = conditions["context"]
        tokens = torch.cat([tokens, context], dim=1)
        timestep = torch.cat([timestep, torch.zeros_like(context[..., 0], dtype=t.dtype)], dim=1)
        # Samples of a batch have reference videos of equal sizes: the grids of one fit all.
        grids = conditions["context_grids"][0].tolist()
        factor = conditions["context_factor"].to(t)
        context_coords = [coordinates(dit, g, frame_rate, factor) for g in grids]
        coords = torch.cat([coords, *context_coords], dim=2)
    video, audio = dit(
        hidden_states=tokens,
        # The transformer needs some audio. A silent clip gets one zero token, which
        # `isolate_modalities` hides from the video.
        audio_hidden_states=tokens.new_zeros(len(t), 1, dit.config.audio_in_channels)
        if sound is None
        else sound,
        encoder_hidden_states=conditions["prompt_embeds"],
        audio_encoder_hidden_states=conditions["audio_prompt_embeds"],
        timestep=timestep,
        audio_timestep=t,
        sigma=t,
        audio_num_frames=1 if sound is None else sound.shape[1],
        video_coords=coords,
        isolate_modalities=sound is None,
        use_cross_timestep=True,
        return_dict=False,
    )
    # The tokens of the reference videos come last and are dropped.
    velocity = {"video": video[:, :count].transpose(1, 2).unflatten(2, grid)}
    return velocity if sound is None else velocity | {"audio": audio}


def shapes(loaded: Loaded, request: SampleRequest) -> dict[str, tuple[int, ...]]:
    """The shapes of `video` latents and `audio` tokens: see `Sampling.shapes`."""
    vae, sound = loaded["vae"], loaded["audio_vae"]
    frames = 1 + (request.num_frames - 1) // FRAMES_PER_LATENT
    factor = vae.spatial_compression_ratio
    grid = (frames, request.height // factor, request.width // factor)
    seconds = request.num_frames / (request.frame_rate or FRAME_RATE)
    length = round(seconds * SOUND_RATE / HOP / sound.temporal_compression_ratio)
    width = sound.config.latent_channels * (MEL_BINS // sound.mel_compression_ratio)
    return {"video": (vae.config.latent_channels, *grid), "audio": (length, width)}


def decode(loaded: Loaded, request: SampleRequest, latents: Tensors) -> list[Clip]:
    """Decode videos with sound: see `Sampling.decode`."""
    videos = decode_clips(loaded["vae"], latents["video"])
    sounds = loaded["vocoder"](decode_sound(loaded["audio_vae"], latents["audio"]))
    sound_rate = loaded["vocoder"].config.output_sampling_rate
    return [
        Clip(
            pictures(video.transpose(0, 1)),
            request.frame_rate or FRAME_RATE,
            sound.float().cpu().clamp(-1.0, 1.0),
            sound_rate,
        )
        for video, sound in zip(videos, sounds, strict=True)
    ]
