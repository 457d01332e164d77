"""Frames of a video that are given, not predicted."""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from diffusers.pipelines.ltx2.utils import apply_image_conditioning_crf

from diffsynth_dagster.data.columns import Input
from diffsynth_dagster.families.contract import Loaded, Output, Sample, Stage, Tensors


def compressed(frame: torch.Tensor, crf: int) -> torch.Tensor:
    """Compress a frame (3, H, W) in [-1, 1] with H.264 and decode it again. Its sides must be even.

    Args:
        crf: constant rate factor of libx264, from 1 (almost lossless) to 51.
    """
    pixels = ((frame + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    decoded = apply_image_conditioning_crf(pixels.permute(1, 2, 0).cpu().numpy(), crf)
    return torch.from_numpy(decoded).permute(2, 0, 1).to(frame) / 127.5 - 1


def know_first_frame(loaded: Loaded, samples: Sequence[Sample], stride: int) -> list[Tensors]:
    """Video (3, F, H, W) → the mask `first_frame` (1, F', 1, 1), which is 1 for the first latent
    frame. A causal VAE encodes this one from the first frame alone.

    Args:
        stride: video frames per latent frame.
    """
    results: list[Tensors] = []
    for sample in samples:
        mask = torch.zeros(1, 1 + (sample["video"].shape[1] - 1) // stride, 1, 1)
        mask[:, 0] = 1
        results.append({"first_frame": mask})
    return results


def known_frame_stage(video: Input, stride: int) -> Stage:
    """The stage that marks the first frame of the target `video` as known.

    Args:
        video: the column of the videos.
        stride: see `know_first_frame`.
    """
    known = Output("first_frame", "known", of="video")
    run = partial(know_first_frame, stride=stride)
    return Stage("known_frame", (video,), ("vae",), (known,), run)


def encode_given(
    videos: torch.Tensor,
    given: Sequence[int],
    stride: int,
    encode: Callable[[torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """Videos (B, 3, F, H, W) → a mask of the given frames and their latents,
    (B, stride + C, F', H', W').

    The mask has one channel for each video frame of a latent frame. The latents are those of the
    videos with all other frames grey (0).

    Args:
        given: the indices of the given frames.
        stride: video frames per latent frame.
        encode: videos in [-1, 1] → latents (B, C, F', H', W').
    """
    frames = torch.zeros(videos.shape[2])
    frames[list(given)] = 1
    latents = encode(videos * frames.view(-1, 1, 1))
    # The first latent frame encodes one video frame alone, which fills all channels of its mask.
    mask = torch.cat([frames[:1].expand(stride - 1), frames]).view(-1, stride).T
    size = (len(latents), stride, *latents.shape[2:])
    return torch.cat([mask[:, :, None, None].to(latents.device).expand(size), latents], dim=1)
