"""Frames of a video that are given, not predicted."""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from diffusers.pipelines.ltx2.utils import apply_image_conditioning_crf

from diffsynth_dagster.data.columns import Input
from diffsynth_dagster.families.contract import Loaded, Output, Sample, Stage, Tensors


def compressed(frame: torch.Tensor, crf: int) -> torch.Tensor:
    """Frame (3, H, W) in [-1, 1], with even sides → what H.264 leaves of it.

    Args:
        crf: constant rate factor of libx264, from 1 (nearly all is kept) to 51.
    """
    pixels = ((frame + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    left = apply_image_conditioning_crf(pixels.permute(1, 2, 0).cpu().numpy(), crf)
    return torch.from_numpy(left).permute(2, 0, 1).to(frame) / 127.5 - 1


def know_first_frame(loaded: Loaded, samples: Sequence[Sample], stride: int) -> list[Tensors]:
    """Video (3, F, H, W) → `first_frame` (1, F', 1, 1): 1 for the first latent frame, which a
    causal VAE makes of the first frame alone.

    Args:
        stride: frames to a latent one.
    """
    results: list[Tensors] = []
    for sample in samples:
        mask = torch.zeros(1, 1 + (sample["video"].shape[1] - 1) // stride, 1, 1)
        mask[:, 0] = 1
        results.append({"first_frame": mask})
    return results


def known_frame_stage(video: Input, stride: int) -> Stage:
    """The stage that gives the first frame in the video itself, which is the target `video`: see
    `know_first_frame`."""
    known = Output("first_frame", "known", of="video")
    run = partial(know_first_frame, stride=stride)
    return Stage("known_frame", (video,), ("vae",), (known,), run)


def encode_given(
    videos: torch.Tensor,
    given: Sequence[int],
    stride: int,
    encode: Callable[[torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """Videos (B, 3, F, H, W) → (B, stride + C, F', H', W'): a mask of the frames that are given,
    with a channel for each frame of a latent one (the first fills one alone), and the latents of
    the videos in which the others are grey (0).

    Args:
        given: the indices of the frames that are given.
        stride: frames of a latent one.
        encode: videos in [-1, 1] → latents (B, C, F', H', W').
    """
    frames = torch.zeros(videos.shape[2])
    frames[list(given)] = 1
    latents = encode(videos * frames.view(-1, 1, 1))
    mask = torch.cat([frames[:1].expand(stride - 1), frames]).view(-1, stride).T
    size = (len(latents), stride, *latents.shape[2:])
    return torch.cat([mask[:, :, None, None].to(latents.device).expand(size), latents], dim=1)
