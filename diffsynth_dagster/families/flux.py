"""FLUX.1, text to image, with reference images (Kontext) or a ControlNet (Black Forest Labs 2024;
Batifol et al. 2025, arXiv:2506.15742).

Modules come from diffusers and transformers. Files are those of FLUX.1-dev, FLUX.1-Krea-dev and
FLUX.1-Kontext-dev: the folders of diffusers, or `flux1-*.safetensors` and `ae.safetensors`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline
from PIL import Image
from torch import nn
from transformers import (
    CLIPTokenizer,
    T5TokenizerFast,  # pyright: ignore[reportAttributeAccessIssue]  (an alias made when imported)
)

from diffsynth_dagster.config.parameters import TrainingConfig
from diffsynth_dagster.data.geometry import Geometry
from diffsynth_dagster.errors import ParameterError
from diffsynth_dagster.families.contract import (
    Family,
    Input,
    Loaded,
    Output,
    Sample,
    SampleRequest,
    Shapes,
    Stage,
    Tensors,
    Tokenizer,
)
from diffsynth_dagster.families.flux_modules import COMPONENTS
from diffsynth_dagster.families.flux_names import close_lora, open_lora
from diffsynth_dagster.families.support import PATCH, pack, published_sigmas, unpack
from diffsynth_dagster.objective.flow import FlowPath, flow_path, linear_shift

MAX_T5_TOKENS = 512
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

KONTEXT, CONTROL, MODE = "kontext_images", "controlnet_image", "controlnet_processor_id"
MODES = ("canny", "tile", "depth", "blur", "pose", "gray", "lq")
"""What a union ControlNet is given, in the order of its modes."""

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


def _tokens(tokenizer: Any, samples: Sequence[Sample], length: int) -> torch.Tensor:
    """Prompts → tokens (B, length). The transformer attends to the padding."""
    prompts = [sample["prompt"] for sample in samples]
    return tokenizer(
        prompts, padding="max_length", max_length=length, truncation=True, return_tensors="pt"
    ).input_ids


def encode_pooled(loaded: Loaded, samples: Sequence[Sample]) -> list[Tensors]:
    """Prompt → `pooled_prompt_embeds` (hidden,) of CLIP."""
    clip = loaded["text_encoder"]
    tokens = _tokens(loaded["tokenizer"], samples, clip.config.max_position_embeddings)
    pooled = clip(tokens.to(clip.device)).pooler_output
    return [{"pooled_prompt_embeds": embeds} for embeds in pooled]


def encode_prompt(loaded: Loaded, samples: Sequence[Sample]) -> list[Tensors]:
    """Prompt → `prompt_embeds` (512, hidden) of T5."""
    t5 = loaded["text_encoder_2"]
    tokens = _tokens(loaded["tokenizer_2"], samples, MAX_T5_TOKENS)
    return [{"prompt_embeds": e} for e in t5(tokens.to(t5.device)).last_hidden_state]


def _latents(vae: AutoencoderKL, images: Sequence[torch.Tensor]) -> torch.Tensor:
    """Images (3, H, W) → (B, C, H/8, W/8): the mode of the VAE's posterior, normalised."""
    config: Any = vae.config
    pixels = torch.stack(list(images)).to(vae.device, vae.dtype)
    posterior: Any = vae.encode(pixels)
    latents = posterior.latent_dist.mode().float()
    return (latents - config.shift_factor) * config.scaling_factor


def encode_image(
    loaded: Loaded, samples: Sequence[Sample], column: str = "image", name: str = "image"
) -> list[Tensors]:
    """Image (3, H, W) of a column → latents (C, H/8, W/8) called `name`."""
    images = [sample[column] for sample in samples]
    return [{name: latents} for latents in _latents(loaded["vae"], images)]


def encode_control(loaded: Loaded, samples: Sequence[Sample]) -> list[Tensors]:
    """`controlnet_image` → `control` (C, H/8, W/8); its mode's name → `control_mode` ()."""
    encoded = encode_image(loaded, samples, CONTROL, "control")
    for sample, tensors in zip(samples, encoded, strict=True):
        if MODE in sample:
            tensors["control_mode"] = torch.tensor(MODES.index(sample[MODE].strip()))
    return encoded


def encode_kontext(loaded: Loaded, samples: Sequence[Sample]) -> list[Tensors]:
    """Reference images → `kontext` (L, 4 C), the tokens of all one after another, and their
    `kontext_ids` (L, 3), whose first axis counts the images from 1."""
    tokens: list[torch.Tensor] = []
    ids: list[torch.Tensor] = []
    for number, images in enumerate(zip(*(s[KONTEXT] for s in samples), strict=True), 1):
        latents = _latents(loaded["vae"], images)
        tokens.append(pack(latents))
        ids.append(position_ids(latents, number))
    together = torch.cat(ids)
    return [{"kontext": t, "kontext_ids": together} for t in torch.cat(tokens, 1)]


def position_ids(latents: torch.Tensor, number: int = 0) -> torch.Tensor:
    """Rotary positions of the tokens of latents (B, C, H, W): `number`, row, column (L, 3)."""
    height, width = (side // PATCH for side in latents.shape[-2:])
    axes = [torch.arange(n, device=latents.device) for n in (height, width)]
    rows, columns = torch.meshgrid(*axes, indexing="ij")
    return torch.stack([torch.full_like(rows, number), rows, columns], -1).view(-1, 3)


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


_KONTEXT_STAGE = Stage(
    "kontext",
    (Input(KONTEXT, "image", many=True),),
    ("vae",),
    (Output("kontext", "condition"), Output("kontext_ids", "condition")),
    encode_kontext,
)


_MODE_INPUT = Input(
    MODE, "text", pattern=rf"^\s*(?:{'|'.join(MODES)})\s*$", wants=f"one of {', '.join(MODES)}"
)


def _control_stage(is_union: bool) -> Stage:
    modes = (Output("control_mode", "condition"),) if is_union else ()
    return Stage(
        "control",
        (
            Input(CONTROL, "image", same_size=True),
            *((_MODE_INPUT,) if is_union else ()),
        ),
        ("vae",),
        (Output("control", "condition"), *modes),
        encode_control,
    )


def variant(config: TrainingConfig, given: Mapping[str, Shapes]) -> Family:
    """FLUX.1 with the columns that `extra_inputs` names.

    Raises:
        ParameterError: the columns do not fit each other, or the ControlNet.
    """
    extra = config.extra_inputs
    _check_control(config, given)
    stages = list(FAMILY.stages)
    if KONTEXT in extra:
        stages.append(_KONTEXT_STAGE)
    if CONTROL in extra:
        stages.append(_control_stage(MODE in extra))
    if config.align_to_opensource_format and config.lora_base_model not in (None, "dit"):
        raise ParameterError(
            f"the open format has no names for a LoRA of '{config.lora_base_model}' here",
            where="align_to_opensource_format",
            do="leave it out: the export for diffusers is written anyway",
        )
    return replace(FAMILY, stages=tuple(stages))


def _check_control(config: TrainingConfig, given: Mapping[str, Shapes]) -> None:
    """Check that a ControlNet and its columns go together, as far as the models are known."""
    extra = config.extra_inputs
    all_told = len(given) == len(config.model_paths) + len(config.model_id_with_origin_paths)
    shapes = given.get("controlnet")
    is_union = "controlnet_mode_embedder.weight" in (shapes or ())

    def refuse(what: str, do: str) -> None:
        raise ParameterError(what, where="extra_inputs", do=do)

    if CONTROL in extra and shapes is None and all_told and not config.encodes_only:
        refuse(f"{CONTROL} is given but no ControlNet", "add its files to the model list")
    if CONTROL not in extra and shapes is not None:
        refuse(f"the model list has a ControlNet, but {CONTROL} is not given", f"name {CONTROL}")
    if CONTROL not in extra and MODE in extra:
        refuse(f"{MODE} is given but not {CONTROL}", f"name {CONTROL} as well")
    if CONTROL in extra and KONTEXT in extra:
        refuse(f"{KONTEXT} and {CONTROL} do not go together", "name one of them")
    if shapes and any(name.startswith("input_hint_block.") for name in shapes):
        refuse(
            "the ControlNet reads its image with layers of its own, which is not supported",
            "give one that reads latents, such as those of InstantX, Shakker Labs or Jasper",
        )
    dit = given.get("dit")
    if dit and dit["x_embedder.weight"][1] != dit["proj_out.weight"][0]:
        refuse(
            "the transformer is given an image beside the noise (Fill, Depth, Canny), which is not "
            "supported",
            "give FLUX.1-dev, Krea-dev or Kontext-dev",
        )
    if shapes and shapes["controlnet_x_embedder.weight"] != shapes["x_embedder.weight"]:
        refuse(
            "the ControlNet reads more than an image (an inpainting one, with a mask), which is "
            "not supported",
            "give one that reads an image alone",
        )
    if shapes and is_union and MODE not in extra:
        refuse(f"the ControlNet is a union of several, and {MODE} is not given", f"name {MODE}")
    if shapes and not is_union and MODE in extra:
        refuse(f"{MODE} is given, but the ControlNet has no modes", "leave it out")


FAMILY = Family(
    name="flux",
    components=COMPONENTS,
    tokenizers=(
        Tokenizer(
            "tokenizer",
            "tokenizer_1_path",
            "black-forest-labs/FLUX.1-dev:tokenizer/",
            CLIPTokenizer.from_pretrained,
        ),
        Tokenizer(
            "tokenizer_2",
            "tokenizer_2_path",
            "black-forest-labs/FLUX.1-dev:tokenizer_2/",
            T5TokenizerFast.from_pretrained,
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
