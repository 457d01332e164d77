"""LTX-2 and 2.3: video with sound, from text, a first frame, or reference videos (HaCohen et al.
2026, arXiv:2601.03233).

`extra_inputs` may list:

- `input_audio`: a column with the sound of each clip, either an audio file or the clip itself. An
  empty cell means a silent clip.
- `input_image`: the first frame of the video is given. `first_frame_crf` compresses it, as the
  authors do when they make a video.
- `in_context_videos`: reference videos (IC-LoRA).
"""

import re
from collections.abc import Mapping
from dataclasses import replace
from functools import partial

from diffusers.pipelines.ltx2.utils import DEFAULT_NEGATIVE_PROMPT

from diffsynth_dagster.config.parameters import TrainingConfig
from diffsynth_dagster.data.columns import Input
from diffsynth_dagster.data.geometry import FrameRule, Geometry
from diffsynth_dagster.families.contract import (
    Denoiser,
    Family,
    Output,
    SampleRequest,
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
from diffsynth_dagster.families.shared.schedule import EulerSteps, sigmas_at
from diffsynth_dagster.objective.flow import (
    FlowPath,
    exponential_shift,
    flow_path,
    linear_sigmas,
    stretch_to,
)

# scheduler/scheduler_config.json of LTX-2. Only samples use it: training has a constant shift.
SCHEDULER = {
    "base_image_seq_len": 1024,
    "base_shift": 0.95,
    "max_image_seq_len": 4096,
    "max_shift": 2.05,
    "shift_terminal": 0.1,
    "use_dynamic_shifting": True,
}
# The published max_shift and shift_terminal: the shift of the longest sequences.
TRAINING_MU, TERMINAL = 2.05, 0.1
FACTOR = Input(stages.FACTOR, "number", pattern=r"^\s*[1-9]\d*(?:\.0*)?\s*$", wants="1, 2, 3, …")
CONTEXT = Input(stages.CONTEXT, "video", many=True, same_size=True, divided_by=stages.FACTOR)


def noising(config: TrainingConfig, published: Settings) -> FlowPath:
    """Flow matching, exponential shift with mu = 2.05, stretched so that the last sigma is 0.1."""
    sigmas = stretch_to(exponential_shift(linear_sigmas(), TRAINING_MU), TERMINAL)
    return flow_path(
        sigmas, f"flow matching, exponential shift mu={TRAINING_MU}, terminal {TERMINAL}"
    )


def solver(request: SampleRequest, noise: Tensors) -> EulerSteps:
    """The published sampler. Its shift grows with the number of video tokens, among which diffusers'
    pipeline counts those of the reference videos."""
    # One channel of one sample has one element per token.
    tokens = noise["video"][0, 0].numel()
    if "context" in request.conditions:
        tokens += request.conditions["context"].shape[1]
    return EulerSteps(sigmas_at(SCHEDULER, request.num_inference_steps, tokens))


def variant(family: Family, config: TrainingConfig, given: Mapping[str, Shapes]) -> Family:
    """LTX-2 with a stage for each input in `extra_inputs`."""
    extra, steps = config.extra_inputs, list(family.stages)
    crf, video = config.first_frame_crf, steps.index(VIDEO_STAGE)
    if crf is not None:
        run, settings = partial(stages.encode_from_compressed, crf=crf), (("first_frame_crf", crf),)
        steps[video] = replace(VIDEO_STAGE, run=run, settings=settings)
    frame_rate = config.frame_rate or stages.FRAME_RATE
    if SOUND.column in extra:
        steps.append(SOUND_STAGE)
    if "input_image" in extra:
        steps.append(known_frame_stage(VIDEO, stages.FRAMES_PER_LATENT))
    if CONTEXT.column in extra:
        names = ("context", "context_grids", "context_factor")
        outputs = tuple(Output(name, "condition") for name in names)
        steps.append(Stage("context", (CONTEXT, FACTOR), ("vae",), outputs, stages.encode_context))
    if stages.RATE in extra:
        # All clips are trained at one frame rate. A row with another rate is rejected: its clip
        # would be trained as if it were longer or shorter.
        rate = f"{frame_rate:.10g}"
        pattern, wants = rf"^\s*{re.escape(rate)}(?:\.0*)?\s*$", f"{rate}, the rate of the clips"
        column = Input(stages.RATE, "number", pattern=pattern, wants=wants)
        steps[video] = replace(steps[video], reads=(*VIDEO_STAGE.reads, column))
    # If the first frame is given, a second latent frame is needed: there must be one to predict.
    least = 1 + stages.FRAMES_PER_LATENT if "input_image" in extra else 1
    frames = FrameRule(stages.FRAMES_PER_LATENT, 1, least)
    denoise = partial(stages.denoise, frame_rate=frame_rate)
    geometry = replace(family.geometry, frames=frames)
    return replace(family, stages=tuple(steps), denoise=denoise, geometry=geometry)


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
    # 32: the VAE's factor alone. Every latent is a token.
    geometry=Geometry(
        32, FrameRule(stages.FRAMES_PER_LATENT, 1), 121, stages.FRAME_RATE, (768, 512)
    ),
    sampling=Sampling(
        stages.shapes,
        solver,
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
            # A tensor that LTX-2 and 2.3 do not have.
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
