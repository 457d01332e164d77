"""Samples that are made during training: the request, and the resulting images or clips with sound.

A family declares how it makes samples (`Sampling`). `training.sampling` denoises with it, using the
same `denoise` and the same conditions as a training step.
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
"""Name → tensor."""


@dataclass(frozen=True)
class SampleRequest:
    """Images or clips to make with the model's current weights, all of one size.

    Attributes:
        conditions: the conditions of `denoise`, stacked (B, …).
        negative: the conditions of the negative prompt; None without guidance.
        num_frames: 1 for a family without videos.
        frame_rate: frames per second; None for a family without videos.
        cfg_scale: guidance scale; 1 means no guidance.
        generators: one for each sample.
        noising: the noising path that the model is trained on, which the sampler must invert.
        known: masks of the given elements, by target.
        given: the clean latents of these targets.
        cfg_scales: denoiser → its guidance scale, if it differs from `cfg_scale`.
        negative_prompt: the prompt of `negative`.
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
    """A finished sample: a video, with or without sound. An image is a clip of one frame.

    Attributes:
        frame_rate: frames per second; None for an image.
        sound: float32 (channels, samples) in [-1, 1]; None for a silent clip.
        sound_rate: samples per second and channel.
    """

    frames: list[Image.Image]
    frame_rate: float | None = None
    sound: torch.Tensor | None = None
    sound_rate: int = 0


class Solver(Protocol):
    """Solves the differential equation from noise to data step by step.

    Its state is called x. It is x_t itself, or x_t on another scale.
    """

    @property
    def timesteps(self) -> torch.Tensor:
        """t of each step, (steps,) in [0, 1000], decreasing."""
        ...

    def start(self, noise: Tensors) -> Tensors:
        """The first x, from standard normal noise (B, …)."""
        ...

    def seen(self, x: Tensors, index: int) -> Tensors:
        """x_t, the denoiser's input, from the x of a step."""
        ...

    def step(self, prediction: Tensors, x: Tensors, index: int) -> Tensors:
        """The x of the next step. After the last step, x is the clean latents."""
        ...


Guide = Callable[[Tensors, Tensors, float], Tensors]
"""(prediction with the prompt, without it, scale) → the guided prediction, by target."""


def guide(prompted: Tensors, unprompted: Tensors, scale: float) -> Tensors:
    """Classifier-free guidance (Ho and Salimans 2022, arXiv:2207.12598). 1 means no guidance."""
    return {n: unprompted[n] + scale * (prompted[n] - unprompted[n]) for n in prompted}


@dataclass(frozen=True)
class Sampling:
    """How a family makes samples.

    Attributes:
        shapes: (loaded components, request) → latent shape of one sample, by target.
        solver: (request, noise by target (B, …)) → the published sampler.
        decode: (loaded components, request, clean latents by target (B, …)) → one clip per sample.
        guide: how guidance combines the two predictions.
        unprompted: (conditions of the empty prompt) → the negative conditions to use if there is no
            negative prompt.
        constants: name → value of conditions that have another value in training, such as the
            guidance embedding of a distilled model.
        cfg_scale: the published guidance scale; 1 for none.
        cfg_scales: denoiser → its published guidance scale, if it differs from `cfg_scale`.
        negative_prompt: the published negative prompt.
        distilled: substrings (lower case) of the file names of models that were distilled to need
            no guidance.
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
    """The guidance of a training's samples: see `Sampling`.

    Attributes:
        scale: `cfg_scale` of the samples.
        scales: `cfg_scales` of the samples.
    """

    scale: float
    scales: Mapping[str, float]
    negative_prompt: str

    @property
    def is_on(self) -> bool:
        """Whether any denoiser is guided."""
        # The 1.0 makes `max` work without any `scales`.
        return max(self.scale, *self.scales.values(), 1.0) > 1.0


def guidance_of(config: TrainingConfig, sampling: Sampling) -> Guidance:
    """The guidance that the config asks for, or else the published one.

    A scale in the config applies to all denoisers. A model that is being distilled, was distilled,
    or has a distillation LoRA fused in is sampled without guidance: it is trained to need none.
    """
    prompt = config.sample_negative_prompt
    negative = sampling.negative_prompt if prompt is None else prompt
    if config.sample_cfg_scale is not None:
        return Guidance(config.sample_cfg_scale, {}, negative)
    fused = config.preset_lora_path
    # Weights do not show whether a model was distilled. Only file names do.
    names = [entry.text.lower() for entry in model_entries(config)]
    names += [] if fused is None else [PurePath(fused).name.lower()]
    if config.distills or any(mark in name for mark in sampling.distilled for name in names):
        return Guidance(1.0, {}, negative)
    return Guidance(sampling.cfg_scale, sampling.cfg_scales, negative)
