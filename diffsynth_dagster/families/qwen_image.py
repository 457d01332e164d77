"""Qwen-Image, text to image (Wu et al. 2025, arXiv:2508.02324).

Modules come from diffusers and transformers; files are those of the repositories Qwen/Qwen-Image
and Qwen/Qwen-Image-2512, whose single files already carry diffusers' tensor names.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers import (
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
)
from diffusers.pipelines.qwenimage.pipeline_qwenimage import calculate_shift
from PIL import Image
from torch import nn
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer

from diffsynth_dagster.data.geometry import Geometry
from diffsynth_dagster.families.contract import (
    Component,
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
from diffsynth_dagster.families.support import PATCH, count_blocks, from_config, pack, unpack
from diffsynth_dagster.objective.flow import (
    FlowPath,
    exponential_shift,
    flow_path,
    linear_sigmas,
    stretch_to,
)

PROMPT_TEMPLATE = (
    "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, "
    "quantity, text, spatial relationships of the objects and background:<|im_end|>\n"
    "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
)
MAX_PROMPT_TOKENS = 1024
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
TRAINING_MU = 0.8

LORA_TARGETS = (
    "to_q,to_k,to_v,add_q_proj,add_k_proj,add_v_proj,to_out.0,to_add_out,"
    "img_mlp.net.2,img_mod.1,txt_mlp.net.2,txt_mod.1"
)


def build_dit(shapes: Shapes, config: Mapping[str, Any] | None) -> nn.Module:
    """The transformer. From shapes, the rotary axes take the published shares of a head: 1/8 for
    the frame, 7/16 for each side."""
    if config is not None:
        return from_config(QwenImageTransformer2DModel, config)
    head = shapes["transformer_blocks.0.attn.norm_q.weight"][0]
    inner, in_channels = shapes["img_in.weight"]
    frame = head // 8
    side = (head - frame) // 2
    return QwenImageTransformer2DModel(
        patch_size=PATCH,
        in_channels=in_channels,
        out_channels=shapes["proj_out.weight"][0] // PATCH**2,
        num_layers=count_blocks(shapes, "transformer_blocks."),
        attention_head_dim=head,
        num_attention_heads=inner // head,
        joint_attention_dim=shapes["txt_in.weight"][1],
        axes_dims_rope=(frame, side, side),
    )


def build_vae(shapes: Shapes, config: Mapping[str, Any] | None) -> nn.Module:
    """The image VAE. From shapes, the mean and deviation of the latents are the published ones."""
    if config is not None:
        return from_config(AutoencoderKLQwenImage, config)
    return AutoencoderKLQwenImage(
        base_dim=shapes["encoder.conv_in.weight"][0],
        z_dim=shapes["post_quant_conv.weight"][0],
    )


def convert_text_encoder(tensors: Tensors) -> Tensors:
    """The names of the published files (`visual.…`, `model.layers.…`) → those of transformers."""
    renamed: Tensors = {}
    for name, tensor in tensors.items():
        if name.startswith("visual."):
            name = f"model.{name}"
        elif name.startswith("model.") and not name.startswith(
            ("model.visual.", "model.language_model.")
        ):
            name = name.replace("model.", "model.language_model.", 1)
        renamed[name] = tensor
    return renamed


def build_text_encoder(shapes: Shapes, config: Mapping[str, Any] | None) -> nn.Module:
    """Qwen2.5-VL. From shapes, a head has the 128 channels of every published size, and the
    rotary sections and the vision tower's constants are the published ones."""
    if config is not None:
        return Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig.from_dict(dict(config)))
    text, vision = "model.language_model.", "model.visual."
    vocabulary, hidden = shapes[text + "embed_tokens.weight"]
    tied = "lm_head.weight" not in shapes
    text_config = {
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "num_hidden_layers": count_blocks(shapes, text + "layers."),
        "num_attention_heads": shapes[text + "layers.0.self_attn.q_proj.weight"][0] // 128,
        "num_key_value_heads": shapes[text + "layers.0.self_attn.k_proj.weight"][0] // 128,
        "intermediate_size": shapes[text + "layers.0.mlp.gate_proj.weight"][0],
        "max_position_embeddings": 128000,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {
            "rope_type": "default",
            "mrope_section": [16, 24, 24],
            "rope_theta": 1000000.0,
        },
    }
    vision_config = {
        "depth": count_blocks(shapes, vision + "blocks."),
        "hidden_size": shapes[vision + "patch_embed.proj.weight"][0],
        "intermediate_size": shapes[vision + "blocks.0.mlp.gate_proj.weight"][0],
        "num_heads": 16,
        "out_hidden_size": shapes[vision + "merger.mlp.2.weight"][0],
        "tokens_per_second": 2,
    }
    return Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(
            text_config=text_config, vision_config=vision_config, tie_word_embeddings=tied
        )
    )


def encode_prompt(loaded: Loaded, samples: Sequence[Sample]) -> list[Tensors]:
    """Prompt → `prompt_embeds` (L, hidden): the last hidden states after the template's prefix.

    Prompts of equal token count share a forward pass, so that none is padded. The number of
    template tokens to drop is counted with the tokenizer.
    """
    tokenizer, encoder = loaded["tokenizer"], loaded["text_encoder"]
    drop = len(tokenizer(PROMPT_TEMPLATE.split("{}")[0]).input_ids)
    rows = [
        tokenizer(
            PROMPT_TEMPLATE.format(sample["prompt"]),
            truncation=True,
            max_length=MAX_PROMPT_TOKENS + drop,
        ).input_ids
        for sample in samples
    ]
    results: dict[int, Tensors] = {}
    for length in sorted({len(row) for row in rows}):
        members = [index for index, row in enumerate(rows) if len(row) == length]
        ids = torch.tensor([rows[index] for index in members], device=encoder.device)
        hidden = encoder.model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
        for index, states in zip(members, hidden.last_hidden_state, strict=True):
            results[index] = {"prompt_embeds": states[drop:]}
    return [results[index] for index in range(len(samples))]


def _latent_moments(vae: AutoencoderKLQwenImage) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and deviation of the latents, each (1, C, 1, 1, 1) float32."""
    config: Any = vae.config
    mean = torch.tensor(config.latents_mean, device=vae.device).view(1, -1, 1, 1, 1)
    std = torch.tensor(config.latents_std, device=vae.device).view(1, -1, 1, 1, 1)
    return mean, std


def encode_image(loaded: Loaded, samples: Sequence[Sample]) -> list[Tensors]:
    """Image (3, H, W) → `image` (C, H/8, W/8): the mode of the VAE's posterior, normalised."""
    vae = loaded["vae"]
    pixels = torch.stack([sample["image"] for sample in samples]).to(vae.device, vae.dtype)
    latents = vae.encode(pixels.unsqueeze(2)).latent_dist.mode()
    mean, std = _latent_moments(vae)
    normalised = (latents.float() - mean) / std
    return [{"image": latent} for latent in normalised.squeeze(2)]


def denoise(loaded: Loaded, conditions: Tensors, x_t: Tensors, t: torch.Tensor) -> Tensors:
    """The transformer's velocity for `image` (B, C, H, W) at timesteps t (B,) in [0, 1000]."""
    latents = x_t["image"]
    height, width = latents.shape[-2:]
    dit = loaded["dit"]
    tokens = dit(
        hidden_states=pack(latents),
        encoder_hidden_states=conditions["prompt_embeds"],
        encoder_hidden_states_mask=conditions["prompt_embeds_mask"],
        timestep=t / 1000,
        img_shapes=[[(1, height // PATCH, width // PATCH)]] * len(latents),
        return_dict=False,
    )[0]
    return {"image": unpack(tokens, height, width)}


def path() -> FlowPath:
    """Exponential shift with mu = 0.8, stretched so that the last sigma is 0.02."""
    sigmas = stretch_to(exponential_shift(linear_sigmas(), TRAINING_MU), 0.02)
    return flow_path(sigmas, f"flow matching, exponential shift mu={TRAINING_MU}, terminal 0.02")


def sample(loaded: Loaded, request: SampleRequest) -> list[list[Image.Image]]:
    """Images by diffusers' own pipeline."""
    make: Any = QwenImagePipeline  # takes None where the prompts are already encoded
    pipeline = make(
        scheduler=FlowMatchEulerDiscreteScheduler.from_config(SCHEDULER),
        vae=loaded["vae"],
        text_encoder=None,
        tokenizer=None,
        transformer=loaded["dit"],
    )
    pipeline.set_progress_bar_config(disable=True)
    negative: dict[str, Any] = {}
    if request.negative is not None:
        negative = {
            "negative_prompt_embeds": request.negative["prompt_embeds"],
            "negative_prompt_embeds_mask": request.negative["prompt_embeds_mask"],
        }
    images = pipeline(
        prompt_embeds=request.conditions["prompt_embeds"],
        prompt_embeds_mask=request.conditions["prompt_embeds_mask"],
        true_cfg_scale=request.cfg_scale,
        height=request.height,
        width=request.width,
        num_inference_steps=request.num_inference_steps,
        generator=request.generators,
        max_sequence_length=MAX_PROMPT_TOKENS,
        **negative,
    ).images
    return [[image] for image in images]


def inference_sigmas(steps: int, x_0: Tensors) -> torch.Tensor:
    """The sigmas of the published sampler for the size of `image` (B, C, H, W)."""
    height, width = x_0["image"].shape[-2:]
    scheduler: Any = FlowMatchEulerDiscreteScheduler.from_config(SCHEDULER)
    published = scheduler.config
    mu = calculate_shift(
        height * width // PATCH**2,
        published.base_image_seq_len,
        published.max_image_seq_len,
        published.base_shift,
        published.max_shift,
    )
    scheduler.set_timesteps(sigmas=torch.linspace(1.0, 1 / steps, steps).tolist(), mu=mu)
    return scheduler.sigmas


def load_lora(
    component: str, module: nn.Module, tensors: Tensors, metadata: Mapping[str, Any]
) -> None:
    """Load an exported LoRA the way `QwenImagePipeline.load_lora_weights` does."""
    if component != "dit":
        raise ValueError(f"QwenImagePipeline loads no LoRA into its {component}")
    state = QwenImagePipeline.lora_state_dict(dict(tensors))
    QwenImagePipeline.load_lora_into_transformer(
        state, module, metadata=dict(metadata), low_cpu_mem_usage=True
    )


FAMILY = Family(
    name="qwen_image",
    components=(
        Component(
            "dit",
            "transformer",
            (("txt_norm.weight", "txt_in.weight", "transformer_blocks.0.attn.add_q_proj.weight"),),
            ("QwenImageTransformer2DModel",),
            build_dit,
        ),
        Component(
            "text_encoder",
            "text_encoder",
            (
                ("visual.merger.ln_q.weight", "model.embed_tokens.weight"),
                ("model.visual.merger.ln_q.weight", "model.language_model.embed_tokens.weight"),
            ),
            ("Qwen2_5_VLForConditionalGeneration",),
            build_text_encoder,
            convert_text_encoder,
        ),
        Component(
            "vae",
            "vae",
            (("encoder.conv_in.weight", "decoder.conv_in.weight", "post_quant_conv.weight"),),
            ("AutoencoderKLQwenImage",),
            build_vae,
        ),
    ),
    tokenizers=(
        Tokenizer(
            "tokenizer",
            "tokenizer_path",
            "Qwen/Qwen-Image:tokenizer/",
            Qwen2Tokenizer.from_pretrained,
        ),
    ),
    stages=(
        Stage(
            "prompt",
            (Input("prompt", "text"),),
            ("tokenizer", "text_encoder"),
            (Output("prompt_embeds", "condition", ragged=True),),
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
    lora_targets={"dit": tuple(LORA_TARGETS.split(","))},
    parameters=("tokenizer_path",),
    repositories=("Qwen/Qwen-Image",),
)
