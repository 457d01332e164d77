"""LTX-2 and 2.3, video with sound from text, from its first frame, and from other videos (HaCohen
et al. 2026, arXiv:2601.03233).

`input_audio` in `extra_inputs` names a column with the sound of each clip, a file or the clip
itself; a cell left empty is a silent clip. `input_image` gives the first frame of the video.
`first_frame_crf` compresses that frame, as the authors do when a video is made.
`in_context_videos` are videos beside it (IC-LoRA).
"""

import re
from collections.abc import Mapping
from dataclasses import replace
from functools import partial

import torch
from diffusers.pipelines.ltx2.utils import DEFAULT_NEGATIVE_PROMPT

from diffsynth_dagster.config.parameters import TrainingConfig
from diffsynth_dagster.data.columns import Input
from diffsynth_dagster.data.geometry import FrameRule, Geometry
from diffsynth_dagster.families.contract import (
    Denoiser,
    Family,
    Output,
    Sampling,
    Settings,
    Shapes,
    Stage,
    Tensors,
)
from diffsynth_dagster.families.ltx2 import stages
from diffsynth_dagster.families.ltx2.components import COMPONENTS
from diffsynth_dagster.families.requirements import (
    InputNamed,
    ParameterSet,
    Refusal,
    column_needs,
    refused_model,
)
from diffsynth_dagster.families.shared.frames import known_frame_stage
from diffsynth_dagster.families.shared.gemma import GEMMA_TOKENIZER
from diffsynth_dagster.families.shared.ltx_text import PROMPT_STAGE
from diffsynth_dagster.families.shared.ltx_vae import SOUND, SOUND_STAGE, VIDEO, VIDEO_STAGE
from diffsynth_dagster.families.shared.schedule import euler, sigmas_at
from diffsynth_dagster.objective.flow import (
    FlowPath,
    exponential_shift,
    flow_path,
    linear_sigmas,
    stretch_to,
)

SCHEDULER = {
    "base_image_seq_len": 1024,
    "base_shift": 0.95,
    "max_image_seq_len": 4096,
    "max_shift": 2.05,
    "shift_terminal": 0.1,
    "use_dynamic_shifting": True,
}
TRAINING_MU, TERMINAL = 2.05, 0.1
FACTOR = Input(stages.FACTOR, "number", pattern=r"^\s*[1-9]\d*(?:\.0*)?\s*$", wants="1, 2, 3, …")
CONTEXT = Input(stages.CONTEXT, "video", many=True, same_size=True, divided_by=stages.FACTOR)


def noising(config: TrainingConfig, published: Settings) -> FlowPath:
    """Exponential shift with mu = 2.05, stretched so that the last sigma is 0.1."""
    sigmas = stretch_to(exponential_shift(linear_sigmas(), TRAINING_MU), TERMINAL)
    return flow_path(
        sigmas, f"flow matching, exponential shift mu={TRAINING_MU}, terminal {TERMINAL}"
    )


def inference_sigmas(steps: int, noise: Tensors) -> torch.Tensor:
    """The sigmas of the published sampler, whose shift grows with the tokens of the video."""
    return sigmas_at(SCHEDULER, steps, noise["video"][0, 0].numel())


def variant(family: Family, config: TrainingConfig, given: Mapping[str, Shapes]) -> Family:
    """LTX-2 with the stages of what `extra_inputs` names."""
    extra, wanted = config.extra_inputs, list(family.stages)
    crf, at = config.first_frame_crf, wanted.index(VIDEO_STAGE)
    if crf is not None:
        run, settings = partial(stages.encode_from_compressed, crf=crf), (("first_frame_crf", crf),)
        wanted[at] = replace(VIDEO_STAGE, run=run, settings=settings)
    frame_rate = config.frame_rate or stages.FRAME_RATE
    if SOUND.column in extra:
        wanted.append(SOUND_STAGE)
    if "input_image" in extra:
        wanted.append(known_frame_stage(VIDEO, stages.FRAMES_PER_LATENT))
    if CONTEXT.column in extra:
        names = ("context", "context_grids", "context_factor")
        outputs = tuple(Output(name, "condition") for name in names)
        wanted.append(Stage("context", (CONTEXT, FACTOR), ("vae",), outputs, stages.encode_context))
    if stages.RATE in extra:
        # A clip would be trained as longer or shorter than it is at another rate.
        rate = f"{frame_rate:.10g}"
        pattern, wants = rf"^\s*{re.escape(rate)}(?:\.0*)?\s*$", f"{rate}, the rate of the clips"
        column = Input(stages.RATE, "number", pattern=pattern, wants=wants)
        wanted[at] = replace(wanted[at], reads=(*VIDEO_STAGE.reads, column))
    # Beside a first frame that is given there must be one to predict.
    least = 1 + stages.FRAMES_PER_LATENT if "input_image" in extra else 1
    frames = FrameRule(stages.FRAMES_PER_LATENT, 1, least)
    denoise = partial(stages.denoise, frame_rate=frame_rate)
    geometry = replace(family.geometry, frames=frames)
    return replace(family, stages=tuple(wanted), denoise=denoise, geometry=geometry)


FAMILY = Family(
    name="ltx2",
    components=COMPONENTS,
    tokenizers=(GEMMA_TOKENIZER,),
    stages=(
        PROMPT_STAGE,
        VIDEO_STAGE,
    ),
    denoisers=(Denoiser("dit"),),
    denoise=partial(stages.denoise, frame_rate=stages.FRAME_RATE),
    noising=noising,
    geometry=Geometry(
        32, FrameRule(stages.FRAMES_PER_LATENT, 1), 121, stages.FRAME_RATE, (768, 512)
    ),
    sampling=Sampling(
        stages.shapes,
        euler(inference_sigmas),
        stages.decode,
        cfg_scale=3.0,
        negative_prompt=DEFAULT_NEGATIVE_PROMPT,
        distilled=("distilled",),
    ),
    parameters=("tokenizer_path", "audio_loss_weight", "first_frame_crf"),
    extra_inputs=(SOUND.column, "input_image", CONTEXT.column, FACTOR.column, stages.RATE),
    refusals=(
        Refusal(
            "audio_loss_weight is given, but nothing is trained on sound",
            f"name {SOUND.column} in extra_inputs, or leave the weight out",
            when=(ParameterSet("audio_loss_weight"),),
            unless=(InputNamed(SOUND.column),),
            where="audio_loss_weight",
        ),
        Refusal(
            "first_frame_crf is given, but no first frame is",
            "name input_image in extra_inputs, or leave first_frame_crf out",
            when=(ParameterSet("first_frame_crf"),),
            unless=(InputNamed("input_image"),),
            where="first_frame_crf",
        ),
        column_needs(CONTEXT.column, FACTOR.column),
        column_needs(FACTOR.column, CONTEXT.column),
        refused_model(
            "dit",
            lambda shapes: "keyframes_abs_pos_embedding" in shapes,
            "the transformer is that of LTX-2.5, which is not supported",
            "give one of LTX-2 or 2.3",
        ),
    ),
    variant=variant,
    checkpoints_gradients=True,
    decoder=("vae", "audio_vae", "vocoder"),
    architecture="ltx-2",
    authors="https://github.com/Lightricks/LTX-2",
)
