"""LTX-2 and 2.3, video with sound from text, from its first frame, and from other videos (HaCohen
et al. 2026, arXiv:2601.03233).

`input_audio` in `extra_inputs` names a column with the sound of each clip, a file or the clip
itself; a cell left empty is a silent clip. `input_image` gives the first frame of the video.
`in_context_videos` are videos beside it (IC-LoRA).
"""

import re
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from diffusers import LTX2Pipeline

from diffsynth_dagster.config.parameters import TrainingConfig
from diffsynth_dagster.data.columns import Input
from diffsynth_dagster.data.geometry import FrameRule, Geometry
from diffsynth_dagster.families.contract import (
    Clip,
    Denoiser,
    Family,
    Loaded,
    Output,
    SampleRequest,
    Settings,
    Shapes,
    Stage,
)
from diffsynth_dagster.families.ltx2 import stages
from diffsynth_dagster.families.ltx2.modules import COMPONENTS, convert_dit
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
from diffsynth_dagster.families.shared.pipeline import load_into_transformer, make_pipeline
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
FRAME_RATE, FRAMES_PER_LATENT = 24.0, 8
FACTOR = Input(stages.FACTOR, "number", pattern=r"^\s*[1-9]\d*(?:\.0*)?\s*$", wants="1, 2, 3, …")
CONTEXT = Input(stages.CONTEXT, "video", many=True, same_size=True, divided_by=stages.FACTOR)


def path(config: TrainingConfig, published: Settings) -> FlowPath:
    """Exponential shift with mu = 2.05, stretched so that the last sigma is 0.1."""
    sigmas = stretch_to(exponential_shift(linear_sigmas(), TRAINING_MU), TERMINAL)
    return flow_path(
        sigmas, f"flow matching, exponential shift mu={TRAINING_MU}, terminal {TERMINAL}"
    )


def sample(loaded: Loaded, request: SampleRequest) -> list[Clip]:
    """Videos with sound by diffusers' own pipeline."""
    # A single step has nothing to stretch to the terminal sigma: diffusers divides by zero.
    alone = {"shift_terminal": None} if request.num_inference_steps == 1 else {}
    names = {name: loaded[name] for name in ("audio_vae", "vocoder")}
    pipeline = make_pipeline(LTX2Pipeline, {**SCHEDULER, **alone}, loaded, **names)
    width = request.conditions["prompt_embeds"].shape[-1]

    def connectors(both: torch.Tensor, mask: torch.Tensor, padding_side: str) -> Any:
        # The prompts come as the connectors made them, those of video and sound side by side.
        return both[..., :width], both[..., width:], mask

    vars(pipeline)["connectors"] = connectors
    prompts: dict[str, torch.Tensor] = {}
    for start, given in (("", request.conditions), ("negative_", request.negative)):
        if given is not None:
            both = torch.cat([given["prompt_embeds"], given["audio_prompt_embeds"]], dim=-1)
            prompts[f"{start}prompt_embeds"] = both
            prompts[f"{start}prompt_attention_mask"] = both.new_ones(both.shape[:2])
    rate = request.frame_rate or FRAME_RATE
    made = pipeline(
        **prompts,
        height=request.height,
        width=request.width,
        num_frames=request.num_frames,
        frame_rate=rate,
        num_inference_steps=request.num_inference_steps,
        guidance_scale=request.cfg_scale,
        audio_guidance_scale=request.cfg_scale,
        stg_scale=0.0,
        modality_scale=1.0,
        audio_modality_scale=1.0,
        guidance_rescale=0.0,
        audio_guidance_rescale=0.0,
        audio_stg_scale=0.0,
        spatio_temporal_guidance_blocks=None,
        generator=request.generators,
        output_type="pil",
    )
    sound_rate = loaded["vocoder"].config.output_sampling_rate
    return [
        Clip(frames, rate, sound.float().cpu().clamp(-1.0, 1.0), sound_rate)
        for frames, sound in zip(made.frames, made.audio, strict=True)
    ]


def variant(family: Family, config: TrainingConfig, given: Mapping[str, Shapes]) -> Family:
    """LTX-2 with the stages of what `extra_inputs` names."""
    extra, wanted = config.extra_inputs, list(family.stages)
    frame_rate = config.frame_rate or FRAME_RATE
    if SOUND.column in extra:
        wanted.append(SOUND_STAGE)
    if "input_image" in extra:
        wanted.append(known_frame_stage(VIDEO, FRAMES_PER_LATENT))
    if CONTEXT.column in extra:
        names = ("context", "context_grids", "context_factor")
        outputs = tuple(Output(name, "condition") for name in names)
        wanted.append(Stage("context", (CONTEXT, FACTOR), ("vae",), outputs, stages.encode_context))
    if stages.RATE in extra:
        # A clip would be trained as longer or shorter than it is at another rate.
        rate = f"{frame_rate:.10g}"
        pattern, wants = rf"^\s*{re.escape(rate)}(?:\.0*)?\s*$", f"{rate}, the rate of the clips"
        column = Input(stages.RATE, "number", pattern=pattern, wants=wants)
        at = wanted.index(VIDEO_STAGE)
        wanted[at] = replace(VIDEO_STAGE, reads=(*VIDEO_STAGE.reads, column))
    # Beside a first frame that is given there must be one to predict.
    least = 1 + FRAMES_PER_LATENT if "input_image" in extra else 1
    frames = FrameRule(FRAMES_PER_LATENT, 1, least)
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
    denoise=partial(stages.denoise, frame_rate=FRAME_RATE),
    path=path,
    geometry=Geometry(32, FrameRule(FRAMES_PER_LATENT, 1), 121, FRAME_RATE, (768, 512)),
    sample=sample,
    load_lora=partial(load_into_transformer, LTX2Pipeline),
    lora_targets={"dit": ("to_k", "to_q", "to_v", "to_out.0")},
    from_authors={"dit": convert_dit},
    parameters=("tokenizer_path", "audio_loss_weight"),
    extra_inputs=(SOUND.column, "input_image", CONTEXT.column, FACTOR.column, stages.RATE),
    refusals=(
        Refusal(
            "audio_loss_weight is given, but nothing is trained on sound",
            f"name {SOUND.column} in extra_inputs, or leave the weight out",
            when=(ParameterSet("audio_loss_weight"),),
            unless=(InputNamed(SOUND.column),),
            where="audio_loss_weight",
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
    repositories=("Lightricks/LTX-2", "DiffSynth-Studio/LTX-2"),
)
