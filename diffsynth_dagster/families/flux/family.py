"""FLUX.1: text to image, with reference images (Kontext) or a ControlNet (Black Forest Labs 2024;
Batifol et al. 2025, arXiv:2506.15742).

Reads the files of FLUX.1-dev, FLUX.1-Krea-dev and FLUX.1-Kontext-dev: the diffusers folders, or
`flux1-*.safetensors` and `ae.safetensors`.
"""

from functools import partial

import torch

from diffsynth_dagster.config.parameters import TrainingConfig
from diffsynth_dagster.data.geometry import Geometry
from diffsynth_dagster.families.contract import (
    Denoiser,
    Family,
    Sampling,
    Settings,
)
from diffsynth_dagster.families.flux import stages, variant
from diffsynth_dagster.families.flux.components import COMPONENTS
from diffsynth_dagster.families.limits import TokenLimit
from diffsynth_dagster.families.shared import clip
from diffsynth_dagster.families.shared.latents import (
    decode_images,
    encode_scaled,
    image_shapes,
)
from diffsynth_dagster.families.shared.schedule import dynamic_sigmas, euler
from diffsynth_dagster.families.shared.stages import image_stage, prompt_stage
from diffsynth_dagster.families.shared.t5 import t5_tokenizer
from diffsynth_dagster.objective.flow import FlowPath, flow_path, linear_shift

REPOSITORY = "black-forest-labs/FLUX.1-dev"
# scheduler/scheduler_config.json of FLUX.1-dev. Only samples use it: training has a constant shift.
SCHEDULER = {
    "base_image_seq_len": 256,
    "base_shift": 0.5,
    "max_image_seq_len": 4096,
    "max_shift": 1.15,
    "num_train_timesteps": 1000,
    "shift": 3.0,
    "use_dynamic_shifting": True,
}
SIGMAS = partial(dynamic_sigmas, SCHEDULER)
# Shift and last sigma are those of DiffSynth-Studio's FLUX schedule.
TRAINING_SHIFT = 3.0
LAST_SIGMA = 0.003 / 1.002
# The embedded guidance that the authors publish. Training uses 1: see `stages.TRAINING_GUIDANCE`.
SAMPLING_GUIDANCE = 3.5


def noising(config: TrainingConfig, published: Settings) -> FlowPath:
    """Flow matching with a shift of 3, over sigmas from 1 to 0.003 / 1.002."""
    sigmas = torch.linspace(1.0, LAST_SIGMA, 1000, dtype=torch.float64)
    return flow_path(
        linear_shift(sigmas, TRAINING_SHIFT), f"flow matching, shift {TRAINING_SHIFT:g}"
    )


FAMILY = Family(
    name="flux",
    components=COMPONENTS,
    tokenizers=(
        clip.clip_tokenizer("tokenizer", "tokenizer_1_path", f"{REPOSITORY}:tokenizer/"),
        t5_tokenizer("tokenizer_2", "tokenizer_2_path", f"{REPOSITORY}:tokenizer_2/"),
    ),
    stages=(
        prompt_stage(stages.encode_pooled, "pooled_prompt", output="pooled_prompt_embeds"),
        # CLIP's limit of 77 tokens is not declared above, because T5 reads the rest of the caption.
        prompt_stage(
            stages.encode_prompt,
            uses=("tokenizer_2", "text_encoder_2"),
            limit=TokenLimit("tokenizer_2", stages.MAX_T5_TOKENS),
        ),
        image_stage(encode_scaled),
    ),
    denoisers=(Denoiser("dit"),),
    denoise=stages.denoise,
    noising=noising,
    geometry=Geometry(side_factor=16),  # the VAE's factor of 8, times patches of 2x2
    sampling=Sampling(
        image_shapes, euler(SIGMAS), decode_images, constants={stages.GUIDANCE: SAMPLING_GUIDANCE}
    ),
    inference_sigmas=SIGMAS,
    denoise_uses=("controlnet",),
    parameters=("tokenizer_1_path", "tokenizer_2_path", "align_to_opensource_format"),
    extra_inputs=(stages.KONTEXT, stages.CONTROL, stages.MODE),
    refusals=variant.REFUSALS,
    variant=variant.variant,
    architecture="flux-1-dev",
    authors="https://github.com/black-forest-labs/flux",
)
