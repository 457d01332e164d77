"""Qwen-Image (Wu et al. 2025, arXiv:2508.02324): text to image, and editing with `edit_image`.

Reads the files of Qwen/Qwen-Image, -2512, -Edit, -Edit-2509 and -Edit-2511, and of
FireRedTeam/FireRed-Image-Edit-1.0 and -1.1.
"""

from functools import partial

from transformers import Qwen2Tokenizer

from diffsynth_dagster.config.parameters import TrainingConfig
from diffsynth_dagster.data.geometry import Geometry
from diffsynth_dagster.families.contract import (
    Denoiser,
    Family,
    Sampling,
    Settings,
    Tokenizer,
)
from diffsynth_dagster.families.qwen_image import edit, stages
from diffsynth_dagster.families.qwen_image.components import COMPONENTS
from diffsynth_dagster.families.shared.qwen_vl import MARKERS
from diffsynth_dagster.families.shared.schedule import dynamic_sigmas, euler
from diffsynth_dagster.families.shared.stages import image_stage, prompt_stage
from diffsynth_dagster.objective.flow import (
    FlowPath,
    exponential_shift,
    flow_path,
    linear_sigmas,
    stretch_to,
)

# scheduler/scheduler_config.json of Qwen-Image. Only samples use it: training has a constant shift.
SCHEDULER = {
    "base_image_seq_len": 256,
    "base_shift": 0.5,
    "max_image_seq_len": 8192,
    "max_shift": 0.9,
    "num_train_timesteps": 1000,
    "shift": 1.0,
    "shift_terminal": 0.02,
    "time_shift_type": "exponential",
    "use_dynamic_shifting": True,
}
SIGMAS = partial(dynamic_sigmas, SCHEDULER)
TRAINING_MU = 0.8  # as DiffSynth-Studio trains, whatever the image size


def noising(config: TrainingConfig, published: Settings) -> FlowPath:
    """Flow matching, exponential shift with mu = 0.8, stretched so that the last sigma is 0.02."""
    sigmas = stretch_to(exponential_shift(linear_sigmas(), TRAINING_MU), 0.02)
    return flow_path(sigmas, f"flow matching, exponential shift mu={TRAINING_MU}, terminal 0.02")


FAMILY = Family(
    name="qwen_image",
    components=COMPONENTS,
    tokenizers=(
        Tokenizer(
            "tokenizer",
            "tokenizer_path",
            "Qwen/Qwen-Image:tokenizer/",
            Qwen2Tokenizer.from_pretrained,
            MARKERS,
        ),
    ),
    stages=(
        prompt_stage(stages.encode_prompt, ragged=True, limit=stages.PROMPT_LIMIT),
        image_stage(stages.encode_pixels),
    ),
    denoisers=(Denoiser("dit"),),
    denoise=stages.denoise,
    noising=noising,
    geometry=Geometry(side_factor=16),  # the VAE's factor of 8, times patches of 2x2
    sampling=Sampling(
        stages.shapes,
        euler(SIGMAS),
        stages.decode,
        stages.guide,
        cfg_scale=4.0,
        distilled=("qwen-image-distill", "qwen-image-lightning"),
    ),
    inference_sigmas=SIGMAS,
    parameters=("tokenizer_path", "processor_path", "zero_cond_t", "edit_plus"),
    extra_inputs=(edit.COLUMN,),
    refusals=edit.REFUSALS,
    variant=edit.variant,
    architecture="qwen-image",
    authors="https://github.com/QwenLM/Qwen-Image",
)
