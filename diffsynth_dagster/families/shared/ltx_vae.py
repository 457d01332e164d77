"""LTX-2's VAEs of video and sound, and its vocoder: their components, encoding and decoding."""

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import AutoencoderKLLTX2Audio, AutoencoderKLLTX2Video
from diffusers.loaders import single_file_utils
from diffusers.pipelines.ltx2 import LTX2Vocoder, LTX2VocoderWithBWE
from transformers.audio_utils import mel_filter_bank

from diffsynth_dagster.data.columns import Input
from diffsynth_dagster.families.contract import (
    Component,
    ComponentNames,
    Construction,
    Loaded,
    Output,
    Recognition,
    Sample,
    Settings,
    Shapes,
    Stage,
    Tensors,
)
from diffsynth_dagster.families.shared.architecture import count_blocks
from diffsynth_dagster.families.shared.latents import stacked

_SAMPLE = 32, 8
"""Pixels per side and frames of a latent."""
SOUND_RATE, SOUND_CHANNELS = 16000, 2
"""Samples per second and channels of the sound that the audio VAE was trained on."""
FFT, HOP, MEL_BINS, QUIET = 1024, 160, 64, 1e-5
"""Of the audio VAE's spectrograms: samples of a window, samples between two windows, mel bins, and
the smallest magnitude."""


def vae_settings(shapes: Shapes) -> Settings:
    """The settings of the video VAE.

    Raises:
        ValueError: the decoder is not 2.0's. The shapes do not show the settings of other decoders.
    """
    down = count_blocks(shapes, "encoder.down_blocks.")
    levels = [f"encoder.down_blocks.{i}." for i in range(down)] + ["encoder.mid_block."]
    settings: Settings = {
        "latent_channels": shapes["latents_mean"][0],
        "block_out_channels": tuple(
            shapes[f"{level}resnets.0.conv1.conv.weight"][0] for level in levels[1:]
        ),
        "layers_per_block": tuple(count_blocks(shapes, f"{level}resnets.") for level in levels),
        "decoder_causal": False,
        "spatial_compression_ratio": _SAMPLE[0],
        "temporal_compression_ratio": _SAMPLE[1],
    }
    up = count_blocks(shapes, "decoder.up_blocks.")
    if not up:  # a file with the encoder alone
        return settings
    if up != down - 1:
        raise ValueError(f"a decoder of {up} levels needs its config.json")
    rising = ["decoder.mid_block.", *(f"decoder.up_blocks.{i}." for i in range(up))]
    # Each level halves the channels, and the settings want the number before it.
    widths = [2 * shapes[f"{level}resnets.0.conv1.conv.weight"][0] for level in rising[1:]]
    return settings | {
        "decoder_block_out_channels": tuple(widths[::-1]),
        "decoder_layers_per_block": tuple(
            count_blocks(shapes, f"{level}resnets.") for level in rising[::-1]
        ),
    }


def audio_vae_settings(shapes: Shapes) -> Settings:
    """The settings of the audio VAE, which encodes spectrograms of 64 mel bins."""
    levels = range(count_blocks(shapes, "encoder.down."))
    base, channels = shapes["encoder.conv_in.conv.weight"][:2]
    widths = [shapes[f"encoder.down.{i}.block.0.conv2.conv.weight"][0] for i in levels]
    return {
        "base_channels": base,
        "in_channels": channels,
        "output_channels": channels,
        # The encoder predicts mean and variance of each channel.
        "latent_channels": shapes["encoder.conv_out.conv.weight"][0] // 2,
        "ch_mult": tuple(width // base for width in widths),
        "num_res_blocks": count_blocks(shapes, "encoder.down.0.block."),
    }


def convert_vae(tensors: Tensors) -> Tensors:
    """Rename the authors' tensors of the video VAE to diffusers' names."""
    if "latents_mean" in tensors:
        return tensors
    return single_file_utils.convert_ltx2_vae_to_diffusers(dict(tensors))


def convert_audio_vae(tensors: Tensors) -> Tensors:
    """Rename the authors' tensors of the audio VAE to diffusers' names."""
    return single_file_utils.convert_ltx2_audio_vae_to_diffusers(dict(tensors))


LTX2_VAE = Component(
    name="vae",
    recognition=Recognition(
        signatures=(
            ("latents_mean", "encoder.mid_block.resnets.0.conv1.conv.weight"),
            (
                "per_channel_statistics.mean-of-means",
                "encoder.down_blocks.0.res_blocks.0.conv1.conv.weight",
            ),
        ),
        checkpoint_prefixes=("vae.",),
        original_globs=("video_vae_encoder.safetensors",),
    ),
    construction=Construction(
        kind=AutoencoderKLLTX2Video,
        settings=vae_settings,
        convert=convert_vae,
        optional_modules=("decoder",),
    ),
    names=ComponentNames(folder="vae"),
)

LTX2_AUDIO_VAE = Component(
    name="audio_vae",
    recognition=Recognition(
        signatures=tuple(
            (mean, "encoder.mid.block_1.conv1.conv.weight")
            for mean in ("latents_mean", "per_channel_statistics.mean-of-means")
        ),
        checkpoint_prefixes=("audio_vae.",),
        original_globs=("audio_vae_encoder.safetensors",),
    ),
    construction=Construction(
        kind=AutoencoderKLLTX2Audio,
        settings=audio_vae_settings,
        convert=convert_audio_vae,
        optional_modules=("decoder",),
    ),
    names=ComponentNames(folder="audio_vae"),
)


_VOCODER = {
    "ups": "upsamplers",
    "resblocks": "resnets",
    "conv_pre": "conv_in",
    "conv_post": "conv_out",
    "act_post": "act_out",
}


def convert_vocoder(tensors: Tensors) -> Tensors:
    """Rename the authors' tensors of the vocoder to diffusers' names."""
    named: Tensors = {}
    for name, tensor in tensors.items():
        # diffusers has no `lowpass` module around the filter of a downsampler.
        parts = [_VOCODER.get(part, part) for part in name.split(".") if part != "lowpass"]
        named[".".join(parts)] = tensor
    return named


LTX2_VOCODER = Component(
    name="vocoder",
    recognition=Recognition(
        signatures=(
            ("conv_in.weight", "upsamplers.0.weight", "conv_out.weight"),
            ("vocoder.conv_in.weight", "bwe_generator.conv_in.weight"),
            ("conv_pre.weight", "ups.0.weight", "conv_post.weight"),
            ("vocoder.conv_pre.weight", "bwe_generator.conv_pre.weight"),
        ),
        checkpoint_prefixes=("vocoder.",),
    ),
    construction=Construction(
        kind=LTX2Vocoder,
        other_kinds={"bwe_generator.": LTX2VocoderWithBWE},
        settings=lambda shapes: {},  # the classes' defaults are the published sizes
        convert=convert_vocoder,
    ),
    names=ComponentNames(folder="vocoder"),
)


def encode_clips(vae: Any, pixels: torch.Tensor) -> torch.Tensor:
    """Videos (B, 3, F, H, W) in [-1, 1] → latents (B, C, 1 + (F - 1) / 8, H/32, W/32) float32."""
    latents = vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist.mode().float()
    mean, std = (t.float().view(-1, 1, 1, 1) for t in (vae.latents_mean, vae.latents_std))
    return (latents - mean) * vae.config.scaling_factor / std


def encode_sound(vae: Any, sound: torch.Tensor) -> torch.Tensor:
    """Sound (B, 2, samples) at 16 kHz → tokens (B, L, C) float32, 25 per second."""
    mel = log_mel(sound.to(vae.device)).to(vae.dtype)
    tokens = vae.encode(mel).latent_dist.mode().float().transpose(1, 2).flatten(2)
    return (tokens - vae.latents_mean.float()) / vae.latents_std.float()


def decode_clips(vae: Any, latents: torch.Tensor) -> torch.Tensor:
    """Latents from `encode_clips` → videos (B, 3, F, H, W)."""
    mean, std = (t.float().view(-1, 1, 1, 1) for t in (vae.latents_mean, vae.latents_std))
    clean = latents * std / vae.config.scaling_factor + mean
    # Some decoders are conditioned on a timestep. 0 means that the latents are clean.
    conditioned = vae.config.timestep_conditioning
    timestep = (
        torch.zeros(len(latents), device=vae.device, dtype=vae.dtype) if conditioned else None
    )
    return vae.decode(clean.to(vae.dtype), timestep, return_dict=False)[0]


def decode_sound(vae: Any, tokens: torch.Tensor) -> torch.Tensor:
    """Tokens from `encode_sound` → log-mel spectrograms (B, 2, T, 64)."""
    clean = tokens * vae.latents_std.float() + vae.latents_mean.float()
    bins = MEL_BINS // vae.mel_compression_ratio
    mel = clean.unflatten(2, (-1, bins)).transpose(1, 2)
    return vae.decode(mel.to(vae.dtype), return_dict=False)[0]


def log_mel(sound: torch.Tensor) -> torch.Tensor:
    """Sound (B, 2, samples) at 16 kHz → log-mel spectrogram (B, 2, 1 + samples / 160, 64).

    Log of magnitudes, with the mel scale and filters of Slaney's auditory toolbox (1998).
    """
    window = torch.hann_window(FFT, device=sound.device)
    spectrum = torch.stft(
        sound.flatten(0, 1), FFT, HOP, window=window, pad_mode="reflect", return_complex=True
    ).abs()
    filters = mel_filter_bank(
        FFT // 2 + 1, MEL_BINS, 0.0, SOUND_RATE / 2, SOUND_RATE, norm="slaney", mel_scale="slaney"
    )
    mel = spectrum.transpose(1, 2) @ torch.from_numpy(filters).float().to(sound.device)
    return mel.clamp(min=QUIET).log().unflatten(0, sound.shape[:2])


def encode_video(loaded: Loaded, samples: Sequence[Sample]) -> list[Tensors]:
    """Video (3, F, H, W) → `video` (C, F', H', W')."""
    latents = encode_clips(loaded["vae"], stacked(samples, "video"))
    return [{"video": latent} for latent in latents]


def encode_audio(loaded: Loaded, samples: Sequence[Sample]) -> list[Tensors]:
    """Sound (2, samples) → `audio` (L, C), 25 tokens per second; no output for a silent clip."""
    # Samples of a batch have equal shapes, so all of them are silent or none is.
    if samples[0]["input_audio"] is None:
        return [{} for _ in samples]
    sound = stacked(samples, "input_audio")
    return [{"audio": tokens} for tokens in encode_sound(loaded["audio_vae"], sound)]


VIDEO = Input("video", "video")
SOUND = Input("input_audio", "audio", optional=True, rate=SOUND_RATE, channels=SOUND_CHANNELS)
VIDEO_STAGE = Stage("video", (VIDEO,), ("vae",), (Output("video", "target"),), encode_video)
SOUND_STAGE = Stage(
    "audio",
    (VIDEO, SOUND),  # the video determines how long the sound is
    ("audio_vae",),
    (Output("audio", "target", optional=True, weight="audio_loss_weight"),),
    encode_audio,
)
