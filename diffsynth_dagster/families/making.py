"""What is asked of a model while it is trained, and what it makes: images, and clips with sound."""

from dataclasses import dataclass

import torch
from PIL import Image

from diffsynth_dagster.objective.path import NoisingPath

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class SampleRequest:
    """Images or clips to make with the model in its present state, one for each prompt.

    `conditions` are the stacked outputs of the stages that read nothing but text, and `negative`
    the same for the empty prompt when cfg_scale is above 1. `num_frames` is 1 and `frame_rate` None
    for a family without videos. `path` is the noising path that the model is trained on: its sampler
    has to undo the same.
    """

    conditions: Tensors
    negative: Tensors | None
    height: int
    width: int
    num_frames: int
    frame_rate: float | None
    num_inference_steps: int
    cfg_scale: float
    generators: list[torch.Generator]
    path: NoisingPath


@dataclass(frozen=True)
class Clip:
    """What is made of a prompt: a video, with or without sound. An image is a clip of one frame.

    Attributes:
        frame_rate: frames per second; None for an image.
        sound: float32 (channels, samples) in [-1, 1]; None for a silent clip.
        sound_rate: samples of each channel per second.
    """

    frames: list[Image.Image]
    frame_rate: float | None = None
    sound: torch.Tensor | None = None
    sound_rate: int = 0
