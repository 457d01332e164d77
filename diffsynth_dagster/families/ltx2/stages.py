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
    """Video (3, F, H, W) → `video` (C, F', H', W'), whose first latent frame is that of the
    compressed first frame. The others are those of the video as it is."""
    vae, videos = loaded["vae"], stacked(samples, "video")
    given = torch.stack([compressed(video[:, 0], crf) for video in videos])
    latents = encode_clips(vae, videos)
    latents[:, :, :1] = encode_clips(vae, given.unsqueeze(2))
    return [{"video": own} for own in latents]


def encode_context(loaded: Loaded, samples: Sequence[Sample]) -> list[Tensors]:
    """Videos beside the sample → `context` (L, C), the tokens of all one after another; their
    `context_grids` (N, 3) and the `context_factor` () that their sides were divided by."""
    # The n-th clips of samples of equal shape are of equal size.
    numbered = zip(*(sample[CONTEXT] for sample in samples), strict=True)
    latents = [encode_clips(loaded["vae"], torch.stack(clips)) for clips in numbered]
    grids = torch.tensor([list(each.shape[2:]) for each in latents])
    together = torch.cat([pack(each) for each in latents], dim=1)
    return [
        {
            "context": own,
            "context_grids": grids,
            "context_factor": torch.tensor(int(sample[FACTOR])),
        }
        for own, sample in zip(together, samples, strict=True)
    ]


def pack(latents: torch.Tensor) -> torch.Tensor:
    """Latents (B, C, F, H, W) → a token for each place (B, F H W, C)."""
    return latents.flatten(2).transpose(1, 2)


def coordinates(
    dit: Any, grid: Sequence[int], frame_rate: float, factor: torch.Tensor
) -> torch.Tensor:
    """Where the tokens of a clip begin and end, (B, 3, F H W, 2): in seconds, and in pixels of the
    sample.

    Args:
        grid: F, H, W.
        factor: (B,), what the sides were divided by.
    """
    batch, (frames, height, width) = len(factor), grid
    places = dit.rope.prepare_video_coords(batch, frames, height, width, factor.device, fps=1.0)
    return torch.cat([places[:, :1] / frame_rate, places[:, 1:] * factor.view(-1, 1, 1, 1)], dim=1)


def denoise(
    dit: Any,
    loaded: Loaded,
    conditions: Tensors,
    x_t: Tensors,
    t: torch.Tensor,
    frame_rate: float,
) -> Tensors:
    """The transformer's velocity for `video` (B, C, F, H, W), and for `audio` (B, L, C) where the
    clips have sound, at timesteps t (B,) in [0, 1000].

    Tokens of a first frame that is given, and of clips beside the sample, have the timestep 0.

    Args:
        frame_rate: frames per second of the clips.
    """
    latents, sound = x_t["video"], x_t.get("audio")
    grid, tokens = latents.shape[2:], pack(latents)
    count, places = tokens.shape[1], coordinates(dit, grid, frame_rate, torch.ones_like(t))
    # A timestep for each token only where they differ.
    some = "first_frame" in conditions or "context" in conditions
    each = t[:, None].expand(-1, count) if some else t
    if "first_frame" in conditions:
        each = each * pack(1 - conditions["first_frame"].to(t).expand_as(latents[:, :1]))[..., 0]
    if "context" in conditions:
        tokens = torch.cat([tokens, conditions["context"]], dim=1)
        each = torch.cat([each, torch.zeros_like(conditions["context"][..., 0], dtype=t.dtype)], 1)
        # Samples of a batch have clips of equal sizes.
        beside = conditions["context_grids"][0].tolist()
        factor = conditions["context_factor"].to(t)
        others = [coordinates(dit, g, frame_rate, factor) for g in beside]
        places = torch.cat([places, *others], dim=2)
    video, audio = dit(
        hidden_states=tokens,
        # A silent clip has one token of silence, which its picture does not see.
        audio_hidden_states=tokens.new_zeros(len(t), 1, dit.config.audio_in_channels)
        if sound is None
        else sound,
        encoder_hidden_states=conditions["prompt_embeds"],
        audio_encoder_hidden_states=conditions["audio_prompt_embeds"],
        timestep=each,
        audio_timestep=t,
        sigma=t,
        audio_num_frames=1 if sound is None else sound.shape[1],
        video_coords=places,
        isolate_modalities=sound is None,
        use_cross_timestep=True,
        return_dict=False,
    )
    velocity = {"video": video[:, :count].transpose(1, 2).unflatten(2, grid)}
    return velocity if sound is None else velocity | {"audio": audio}


def shapes(loaded: Loaded, request: SampleRequest) -> dict[str, tuple[int, ...]]:
    """The latents of `video` and the tokens of `audio`: see `Sampling.shapes`."""
    vae, sound = loaded["vae"], loaded["audio_vae"]
    frames = 1 + (request.num_frames - 1) // FRAMES_PER_LATENT
    factor = vae.spatial_compression_ratio
    grid = (frames, request.height // factor, request.width // factor)
    seconds = request.num_frames / (request.frame_rate or FRAME_RATE)
    length = round(seconds * SOUND_RATE / HOP / sound.temporal_compression_ratio)
    width = sound.config.latent_channels * (MEL_BINS // sound.mel_compression_ratio)
    return {"video": (vae.config.latent_channels, *grid), "audio": (length, width)}


def decode(loaded: Loaded, request: SampleRequest, latents: Tensors) -> list[Clip]:
    """Videos with sound: see `Sampling.decode`."""
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
