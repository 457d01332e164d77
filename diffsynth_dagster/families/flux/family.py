"""FLUX.1, text to image, with reference images (Kontext) or a ControlNet (Black Forest Labs 2024;
Batifol et al. 2025, arXiv:2506.15742).

Modules come from diffusers and transformers. Files are those of FLUX.1-dev, FLUX.1-Krea-dev and
FLUX.1-Kontext-dev: the folders of diffusers, or `flux1-*.safetensors` and `ae.safetensors`.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline
from PIL import Image
from torch import nn
from transformers import (
    CLIPTokenizer,
    T5TokenizerFast,  # pyright: ignore[reportAttributeAccessIssue]  (an alias made when imported)
)

from diffsynth_dagster.config.parameters import TrainingConfig
from diffsynth_dagster.data.columns import Input
from diffsynth_dagster.data.geometry import Geometry
from diffsynth_dagster.errors import ParameterError
from diffsynth_dagster.families.contract import (
    Family,
    Loaded,
    Output,
    SampleRequest,
    Shapes,
    Stage,
    Tensors,
    Tokenizer,
)
from diffsynth_dagster.families.flux.modules import COMPONENTS
from diffsynth_dagster.families.flux.names import close_lora, open_lora
from diffsynth_dagster.families.flux.stages import (
    CONTROL,
    KONTEXT,
    KONTEXT_STAGE,
    MODE,
    check_control,
    control_stage,
    encode_image,
    encode_pooled,
    encode_prompt,
    position_ids,
)
from diffsynth_dagster.families.shared.support import PATCH, pack, published_sigmas, unpack
from diffsynth_dagster.objective.flow import FlowPath, flow_path, linear_shift

SCHEDULER = {
    "base_image_seq_len": 256,
    "base_shift": 0.5,
    "max_image_seq_len": 4096,
    "max_shift": 1.15,
    "num_train_timesteps": 1000,
    "shift": 3.0,
    "use_dynamic_shifting": True,
}
TRAINING_SHIFT = 3.0
LAST_SIGMA = 0.003 / 1.002
TRAINING_GUIDANCE = 1.0
SAMPLING_GUIDANCE = 3.5

_DOUBLE, _SINGLE = "transformer_blocks.*.", "single_transformer_blocks.*."
LORA_ALIASES = {
    "a_to_qkv": tuple(f"{_DOUBLE}attn.to_{x}" for x in "qkv"),
    "b_to_qkv": tuple(f"{_DOUBLE}attn.add_{x}_proj" for x in "qkv"),
    "ff_a.0": (f"{_DOUBLE}ff.net.0.proj",),
    "ff_a.2": (f"{_DOUBLE}ff.net.2",),
    "ff_b.0": (f"{_DOUBLE}ff_context.net.0.proj",),
    "ff_b.2": (f"{_DOUBLE}ff_context.net.2",),
    "a_to_out": (f"{_DOUBLE}attn.to_out.0",),
    "b_to_out": (f"{_DOUBLE}attn.to_add_out",),
    "proj_out": (f"{_SINGLE}proj_out",),
    "norm.linear": (f"{_SINGLE}norm.linear",),
    "norm1_a.linear": (f"{_DOUBLE}norm1.linear",),
    "norm1_b.linear": (f"{_DOUBLE}norm1_context.linear",),
    "to_qkv_mlp": (*(f"{_SINGLE}attn.to_{x}" for x in "qkv"), f"{_SINGLE}proj_mlp"),
}


def denoise(loaded: Loaded, conditions: Tensors, x_t: Tensors, t: torch.Tensor) -> Tensors:
    """The transformer's velocity for `image` (B, C, H, W) at timesteps t (B,) in [0, 1000]."""
    latents, dit = x_t["image"], loaded["dit"]
    height, width = latents.shape[-2:]
    tokens, ids = pack(latents), position_ids(latents)
    embeds = conditions["prompt_embeds"]
    guidance = torch.full_like(t, TRAINING_GUIDANCE)
    more: dict[str, Any] = {
        "timestep": t / 1000,
        "encoder_hidden_states": embeds,
        "pooled_projections": conditions["pooled_prompt_embeds"],
        "txt_ids": ids.new_zeros(embeds.shape[1], 3),
        "return_dict": False,
    }
    double = single = None
    if "control" in conditions:
        controlnet = loaded["controlnet"]
        mode = conditions.get("control_mode")
        double, single = controlnet(
            hidden_states=tokens,
            controlnet_cond=pack(conditions["control"]),
            controlnet_mode=None if mode is None else mode[:, None],
            img_ids=ids,
            guidance=guidance if controlnet.config.guidance_embeds else None,
            **more,
        )
    count = tokens.shape[1]
    if "kontext" in conditions:
        # Samples of a batch have reference images of equal sizes.
        tokens = torch.cat([tokens, conditions["kontext"]], 1)
        ids = torch.cat([ids, conditions["kontext_ids"][0]])
    velocity = dit(
        hidden_states=tokens,
        img_ids=ids,
        guidance=guidance if dit.config.guidance_embeds else None,
        controlnet_block_samples=double,
        controlnet_single_block_samples=single,
        **more,
    )[0]
    return {"image": unpack(velocity[:, :count], height, width)}


def path() -> FlowPath:
    """Shift 3, over sigmas from 1 to 0.003 / 1.002."""
    sigmas = torch.linspace(1.0, LAST_SIGMA, 1000, dtype=torch.float64)
    return flow_path(
        linear_shift(sigmas, TRAINING_SHIFT), f"flow matching, shift {TRAINING_SHIFT:g}"
    )


def sample(loaded: Loaded, request: SampleRequest) -> list[list[Image.Image]]:
    """Images by diffusers' own pipeline."""
    make: Any = FluxPipeline  # takes None where the prompts are already encoded
    pipeline = make(
        scheduler=FlowMatchEulerDiscreteScheduler.from_config(SCHEDULER),
        vae=loaded["vae"],
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        transformer=loaded["dit"],
    )
    pipeline.set_progress_bar_config(disable=True)
    negative = {f"negative_{n}": t for n, t in (request.negative or {}).items()}
    images = pipeline(
        **request.conditions,
        **negative,
        true_cfg_scale=request.cfg_scale,
        guidance_scale=SAMPLING_GUIDANCE,
        height=request.height,
        width=request.width,
        num_inference_steps=request.num_inference_steps,
        generator=request.generators,
    ).images
    return [[image] for image in images]


def inference_sigmas(steps: int, x_0: Tensors) -> torch.Tensor:
    """The sigmas of the published sampler for the size of `image` (B, C, H, W)."""
    height, width = x_0["image"].shape[-2:]
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(SCHEDULER)
    return published_sigmas(scheduler, steps, height * width // PATCH**2)


def load_lora(
    component: str, module: nn.Module, tensors: Tensors, metadata: Mapping[str, Any]
) -> None:
    """Load an exported LoRA the way `FluxPipeline.load_lora_weights` does.

    Raises:
        ValueError: the pipeline would leave layers out.
    """
    state = FluxPipeline.lora_state_dict(dict(tensors))
    left_out = [n for n in state if not n.startswith(("transformer.", "text_encoder."))]
    if left_out:
        raise ValueError(f"FluxPipeline leaves {', '.join(left_out[:3])} out")
    more: dict[str, Any] = {"metadata": dict(metadata) or None, "low_cpu_mem_usage": True}
    if component == "dit":
        FluxPipeline.load_lora_into_transformer(state, None, module, **more)
    elif component == "text_encoder":
        FluxPipeline.load_lora_into_text_encoder(state, None, module, "text_encoder", **more)
    else:
        raise ValueError(f"FluxPipeline loads no LoRA into its {component}")


def variant(config: TrainingConfig, given: Mapping[str, Shapes]) -> Family:
    """FLUX.1 with the columns that `extra_inputs` names.

    Raises:
        ParameterError: the columns do not fit each other, or the ControlNet.
    """
    extra = config.extra_inputs
    check_control(config, given)
    stages = list(FAMILY.stages)
    if KONTEXT in extra:
        stages.append(KONTEXT_STAGE)
    if CONTROL in extra:
        stages.append(control_stage(MODE in extra))
    if config.align_to_opensource_format and config.lora_base_model not in (None, "dit"):
        raise ParameterError(
            f"the open format has no names for a LoRA of '{config.lora_base_model}' here",
            where="align_to_opensource_format",
            do="leave it out: the export for diffusers is written anyway",
        )
    return replace(FAMILY, stages=tuple(stages))


FAMILY = Family(
    name="flux",
    components=COMPONENTS,
    tokenizers=(
        Tokenizer(
            "tokenizer",
            "tokenizer_1_path",
            "black-forest-labs/FLUX.1-dev:tokenizer/",
            CLIPTokenizer.from_pretrained,
            ("<|endoftext|>",),
        ),
        Tokenizer(
            "tokenizer_2",
            "tokenizer_2_path",
            "black-forest-labs/FLUX.1-dev:tokenizer_2/",
            T5TokenizerFast.from_pretrained,
            ("</s>",),
        ),
    ),
    stages=(
        Stage(
            "pooled_prompt",
            (Input("prompt", "text"),),
            ("tokenizer", "text_encoder"),
            (Output("pooled_prompt_embeds", "condition"),),
            encode_pooled,
        ),
        Stage(
            "prompt",
            (Input("prompt", "text"),),
            ("tokenizer_2", "text_encoder_2"),
            (Output("prompt_embeds", "condition"),),
            encode_prompt,
        ),
        Stage(
            "image",
            (Input("image", "image"),),
            ("vae",),
            (Output("image", "target"),),
            encode_image,
        ),
    ),
    denoiser="dit",
    denoise=denoise,
    path=path,
    geometry=Geometry(side_factor=16),
    sample=sample,
    load_lora=load_lora,
    inference_sigmas=inference_sigmas,
    lora_targets={
        "dit": tuple(LORA_ALIASES),
        "text_encoder": ("q_proj", "k_proj", "v_proj", "out_proj"),
    },
    lora_aliases={"dit": LORA_ALIASES},
    open_lora=open_lora,
    close_lora=close_lora,
    denoise_uses=("controlnet",),
    parameters=("tokenizer_1_path", "tokenizer_2_path", "align_to_opensource_format"),
    extra_inputs=(KONTEXT, CONTROL, MODE),
    variant=variant,
    repositories=("black-forest-labs/FLUX.1",),
)
