"""What is asked of a model while it is trained, and what it makes: images, and clips with sound.

A family says what it makes samples of (`Sampling`); `training.sampling` goes from noise to data with
it, by the same `denoise` and with the same conditions as a training step.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any, Protocol

import torch
from PIL import Image

from diffsynth_dagster.config.entries import model_entries
from diffsynth_dagster.config.parameters import TrainingConfig
from diffsynth_dagster.objective.noising import Noising

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class SampleRequest:
    """Images or clips to make with the model in its present state, of one size.

    `conditions` are what `denoise` is handed, stacked (B, …), and `negative` the same with
    `negative_prompt` where there is guidance: of `cfg_scale`, or for a denoiser that has one in
    `cfg_scales` of that. `known` are masks of what is given of a target, and `given` the
    clean latents of these targets. `num_frames` is 1 and `frame_rate` None for a family without
    videos. `noising` is the noising path that the model is trained on: its sampler has to undo the
    same.
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
    noising: Noising
    known: Tensors = field(default_factory=Tensors)
    given: Tensors = field(default_factory=Tensors)
    cfg_scales: Mapping[str, float] = field(default_factory=dict[str, float])
    negative_prompt: str = ""


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


class Solver(Protocol):
    """Solves the differential equation that leads from noise to data, step by step.

    What it carries from step to step is called x here: x_t, or x_t on another scale.
    """

    @property
    def timesteps(self) -> torch.Tensor:
        """t of each step, (steps,) in [0, 1000], falling."""
        ...

    def start(self, noise: Tensors) -> Tensors:
        """x of the first step, from standard normal noise (B, …)."""
        ...

    def seen(self, x: Tensors, index: int) -> Tensors:
        """x_t, as the denoiser sees x in a step."""
        ...

    def step(self, prediction: Tensors, x: Tensors, index: int) -> Tensors:
        """x of the next step; after the last one, the clean latents."""
        ...


Guide = Callable[[Tensors, Tensors, float], Tensors]
"""(prediction with the prompt, without it, scale) → the guided prediction, by target."""


def guide(prompted: Tensors, unprompted: Tensors, scale: float) -> Tensors:
    """Classifier-free guidance (Ho and Salimans 2022, arXiv:2207.12598), with a scale of 1 for none."""
    return {n: unprompted[n] + scale * (prompted[n] - unprompted[n]) for n in prompted}


@dataclass(frozen=True)
class Sampling:
    """How a family makes samples.

    Attributes:
        shapes: (loaded components, request) → target → shape of the latents of one sample.
        solver: (request, noise by target (B, …)) → the published sampler.
        decode: (loaded components, request, clean latents by target (B, …)) → a clip for each sample.
        guide: how guidance combines two predictions.
        unprompted: (conditions with the empty prompt) → those that guidance leads away from, where no
            other negative prompt is given.
        constants: name → number: conditions that `denoise` takes and that the training has at another
            value, such as the guidance that a distilled model is told.
        cfg_scale: guidance that the authors publish; 1 for none.
        cfg_scales: denoiser → the guidance that they publish for it, where that is another one.
        negative_prompt: that they publish.
        distilled: what the files of models contain in their names, in small letters, that were
            distilled to samples without guidance.
    """

    shapes: Callable[[Mapping[str, Any], SampleRequest], dict[str, tuple[int, ...]]]
    solver: Callable[[SampleRequest, Tensors], Solver]
    decode: Callable[[Mapping[str, Any], SampleRequest, Tensors], list[Clip]]
    guide: Guide = guide
    unprompted: Callable[[Tensors], Tensors] = lambda conditions: conditions
    constants: Mapping[str, float] = field(default_factory=dict[str, float])
    cfg_scale: float = 1.0
    cfg_scales: Mapping[str, float] = field(default_factory=dict[str, float])
    negative_prompt: str = ""
    distilled: tuple[str, ...] = ()


@dataclass(frozen=True)
class Guidance:
    """How the samples of a training are guided: see `Sampling`."""

    scale: float
    scales: Mapping[str, float]
    negative_prompt: str

    @property
    def is_on(self) -> bool:
        """Whether there is any."""
        return max(self.scale, *self.scales.values(), 1.0) > 1.0


def guidance_of(config: TrainingConfig, sampling: Sampling) -> Guidance:
    """The guidance of a config: its own, or what is published. A given scale holds for all denoisers.

    What is or was distilled, or has such a LoRA fused in, is sampled without: it was trained to need
    none.
    """
    own = config.sample_negative_prompt
    negative = sampling.negative_prompt if own is None else own
    if config.sample_cfg_scale is not None:
        return Guidance(config.sample_cfg_scale, {}, negative)
    fused = config.preset_lora_path
    names = [entry.text.lower() for entry in model_entries(config)]
    names += [] if fused is None else [PurePath(fused).name.lower()]
    if config.distills or any(mark in name for mark in sampling.distilled for name in names):
        return Guidance(1.0, {}, negative)
    return Guidance(sampling.cfg_scale, sampling.cfg_scales, negative)
