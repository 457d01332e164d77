"""Wan 2.1 and 2.2: video from text, from its first (and last) frame, and VACE (arXiv:2503.20314,
arXiv:2503.07598).

The transformer's tensors and `extra_inputs` determine which model a config trains:

- in_channels = out_channels = 16: video from text. With VACE blocks, `vace_video` and
  `vace_reference_image` control it.
- in_channels = 36: video from a first frame (`input_image`) and optionally a last one
  (`end_image`). A video with all other frames grey is encoded and concatenated to x_t, with a mask
  of 4 channels. Wan2.1 also reads CLIP's features of the given frames.
- in_channels = out_channels = 48 (TI2V-5B): the first latent frame of the video is given, not
  predicted. Its tokens have the timestep 0.

Wan2.2 A14B has two experts. The model list may have one of them, with its part of the schedule in
`min_timestep_boundary` and `max_timestep_boundary`; or both, `dit` (high noise) and `dit2` (low
noise), each with its published part of the schedule.

The given frames are taken from `video`, so `input_image` and `end_image` are not columns.
"""

import torch

from diffsynth_dagster.config.parameters import TrainingConfig
from diffsynth_dagster.data.geometry import FrameRule, Geometry
from diffsynth_dagster.families.contract import (
    Denoiser,
    Family,
    Output,
    Part,
    Sampling,
    Settings,
    Stage,
    Tensors,
)
from diffsynth_dagster.families.shared.schedule import euler
from diffsynth_dagster.families.shared.stages import prompt_stage
from diffsynth_dagster.families.shared.t5 import umt5_tokenizer
from diffsynth_dagster.families.wanvideo import stages, variant
from diffsynth_dagster.families.wanvideo.components import COMPONENTS, VACE_LORA
from diffsynth_dagster.objective.flow import FlowPath, flow_path, linear_shift, linear_sigmas

SHIFT = 5.0
# The authors' configs have the same text for all models.
NEGATIVE_PROMPT = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，"
    "JPEG压缩残留，丑陋的，残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，"
    "手指融合，静止不动的画面，杂乱的背景，三条腿，背景人很多，倒着走"
)


def noising(config: TrainingConfig, published: Settings) -> FlowPath:
    """Flow matching with a shift of 5."""
    return flow_path(linear_shift(linear_sigmas(), SHIFT), f"flow matching, shift {SHIFT:g}")


def inference_sigmas(steps: int, x_0: Tensors) -> torch.Tensor:
    """The sigmas of the published sampler, which do not depend on the size of `x_0`."""
    return linear_shift(torch.linspace(1.0, 0.0, steps + 1), SHIFT)


FAMILY = Family(
    name="wanvideo",
    components=COMPONENTS,
    tokenizers=(
        umt5_tokenizer("tokenizer", "tokenizer_path", "Wan-AI/Wan2.1-T2V-1.3B:google/umt5-xxl/"),
    ),
    stages=(
        prompt_stage(stages.encode_prompt, ragged=True, limit=stages.PROMPT_LIMIT),
        Stage(
            "video", (variant.VIDEO,), ("vae",), (Output("video", "target"),), stages.encode_video
        ),
    ),
    denoisers=(Denoiser("dit"),),
    denoise=stages.denoise,
    noising=noising,
    geometry=Geometry(
        16,  # the VAE's factor of 8, times patches of 2x2
        FrameRule(stages.FRAMES_PER_LATENT, 1),
        sample_size=(832, 480),
        published_frame_rate=stages.RATE,
    ),
    sampling=Sampling(
        stages.shapes,
        euler(inference_sigmas),
        stages.decode,
        cfg_scale=5.0,
        negative_prompt=NEGATIVE_PROMPT,
        distilled=("krea-realtime-video",),
    ),
    inference_sigmas=inference_sigmas,
    parts=(Part("vace", "dit", ("vace_blocks.", "vace_patch_embedding."), lora=VACE_LORA),),
    parameters=("tokenizer_path",),
    extra_inputs=variant.EXTRA_INPUTS,
    refusals=variant.REFUSALS,
    variant=variant.variant,
    checkpoints_gradients=True,
    architecture="wan2.1",
    authors="https://github.com/Wan-Video/Wan2.1",
)
