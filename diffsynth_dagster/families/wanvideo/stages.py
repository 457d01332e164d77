"""The stages of Wan and one call of its transformer: tensors in, tensors out."""

from collections.abc import Sequence
from typing import Any

import torch
from diffusers.pipelines.wan.pipeline_wan import prompt_clean
from PIL import Image
from torch.nn import functional
from transformers import CLIPImageProcessorPil

from diffsynth_dagster.families.contract import Loaded, Sample, Tensors
from diffsynth_dagster.families.shared.latents import encode_standardised, stacked
from diffsynth_dagster.families.shared.text import encode_by_length
from diffsynth_dagster.families.wanvideo.modules import PATCH

PROMPT_TOKENS = 512
FRAMES_PER_LATENT = 4


def encode_prompt(loaded: Loaded, samples: Sequence[Sample]) -> list[Tensors]:
    """Prompt → `prompt_embeds` (L, hidden), L at most 512."""
    tokenizer, encoder = loaded["tokenizer"], loaded["text_encoder"]
    rows = [
        tokenizer(
            prompt_clean(sample["prompt"]), truncation=True, max_length=PROMPT_TOKENS
        ).input_ids
        for sample in samples
    ]

    def encode(ids: torch.Tensor) -> torch.Tensor:
        return encoder(ids, torch.ones_like(ids)).last_hidden_state

    return [{"prompt_embeds": e} for e in encode_by_length(rows, encode, encoder.device)]


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
    """Video (3, F, H, W) → `given_frames` (4 + C, F', H', W'): a mask of the frames that are given
    (four to a latent frame; the first fills one alone), and the latents of the video in which the
    others are grey (0).

    Args:
        last: the last frame is given as well as the first.
    """
    pixels = stacked(samples, "video")
    frames = torch.zeros(pixels.shape[2])
    frames[0] = 1
    if last:
        frames[-1] = 1
    latents = encode_standardised(loaded["vae"], pixels * frames.view(-1, 1, 1))
    mask = torch.cat([frames[:1].expand(FRAMES_PER_LATENT - 1), frames])
    mask = mask.view(-1, FRAMES_PER_LATENT).T[:, :, None, None].to(latents.device)
    size = (FRAMES_PER_LATENT, *latents.shape[2:])
    return [{"given_frames": torch.cat([mask.expand(size), latent])} for latent in latents]


def know_first_frame(loaded: Loaded, samples: Sequence[Sample]) -> list[Tensors]:
    """Video (3, F, H, W) → `first_frame` (1, F', 1, 1): 1 for the first latent frame, which the
    causal VAE makes of the first frame alone."""
    stride = loaded["vae"].config.scale_factor_temporal
    results: list[Tensors] = []
    for sample in samples:
        mask = torch.zeros(1, 1 + (sample["video"].shape[1] - 1) // stride, 1, 1)
        mask[:, 0] = 1
        results.append({"first_frame": mask})
    return results


def encode_features(loaded: Loaded, samples: Sequence[Sample], last: bool = False) -> list[Tensors]:
    """Video (3, F, H, W) → `features` (N, 257, hidden): CLIP's penultimate hidden states of the
    first frame, and of the last one where it is given (N = 2)."""
    encoder = loaded["image_encoder"]
    prepare: Any = CLIPImageProcessorPil()
    results: list[Tensors] = []
    for sample in samples:
        video = sample["video"]
        frames = [video[:, 0], video[:, -1]] if last else [video[:, 0]]
        pixels = prepare(images=[_picture(frame) for frame in frames], return_tensors="pt")
        inputs = pixels.pixel_values.to(encoder.device, encoder.dtype)
        states = encoder(pixel_values=inputs, output_hidden_states=True).hidden_states[-2]
        results.append({"features": states})
    return results


def _picture(frame: torch.Tensor) -> Image.Image:
    """Frame (3, H, W) in [-1, 1] → picture of 8 bits, the values it was read from."""
    pixels = ((frame + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    return Image.fromarray(pixels.permute(1, 2, 0).cpu().numpy())


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
