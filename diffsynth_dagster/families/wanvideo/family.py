"""Wan 2.1 and 2.2, video from text, from its first (and last) frame, and VACE (arXiv:2503.20314,
arXiv:2503.07598).

Which of them a config trains is told from the tensors of its transformer and from `extra_inputs`:

- in_channels = out_channels = 16: video from text. With VACE's blocks, controlled by `vace_video`
  and `vace_reference_image`.
- in_channels = 36: `input_image`, and `end_image` where it is given. The frames of the video that
  are given, the others grey, are encoded and stand beside x_t, with a mask of 4 channels. Wan2.1
  is told CLIP's features of these frames as well.
- in_channels = out_channels = 48 (TI2V-5B): the first latent frame of the video is given and not
  predicted; its tokens are told the timestep 0.

The two experts of Wan2.2 A14B are trained alone: the model list names one of them, and
`min_timestep_boundary` and `max_timestep_boundary` its share of the schedule. All frames that are
given are those of `video`, so that they are no columns.
"""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline
from PIL import Image
from transformers import AutoTokenizer

from diffsynth_dagster.config.entries import model_entries
from diffsynth_dagster.config.parameters import TrainingConfig
from diffsynth_dagster.data.columns import Input
from diffsynth_dagster.data.geometry import FrameRule, Geometry
from diffsynth_dagster.errors import ParameterError
from diffsynth_dagster.families.contract import (
    Component,
    Family,
    Loaded,
    Output,
    Part,
    SampleRequest,
    Shapes,
    Stage,
    Tensors,
    Tokenizer,
)
from diffsynth_dagster.families.shared.support import load_into_transformer
from diffsynth_dagster.families.wanvideo import modules, stages
from diffsynth_dagster.families.wanvideo.modules import PATCH, WIDE_LATENTS
from diffsynth_dagster.objective.flow import FlowPath, flow_path, linear_shift, linear_sigmas

SHIFT = 5.0
WIDE_FACTOR = 32
LORA_TARGETS = ("q", "k", "v", "o", "ffn.0", "ffn.2")

VIDEO = Input("video", "video")
VACE_VIDEO = Input("vace_video", "video", same_size=True)
VACE_REFERENCE = Input("vace_reference_image", "image", same_size=True)


def load_tokenizer(folder: str) -> Any:
    """The tokenizer of a folder, by the class that its files name."""
    make: Any = AutoTokenizer
    return make.from_pretrained(folder, trust_remote_code=False)


def path() -> FlowPath:
    """Shift 5."""
    return flow_path(linear_shift(linear_sigmas(), SHIFT), f"flow matching, shift {SHIFT:g}")


def inference_sigmas(steps: int, x_0: Tensors) -> torch.Tensor:
    """The sigmas of the published sampler, whatever the size of `x_0`."""
    return linear_shift(torch.linspace(1.0, 0.0, steps + 1), SHIFT)


def sample(loaded: Loaded, request: SampleRequest) -> list[list[Image.Image]]:
    """Videos from text by diffusers' own pipeline."""
    make: Any = WanPipeline  # takes None where the prompts are already encoded
    pipeline = make(
        tokenizer=None,
        text_encoder=None,
        vae=loaded["vae"],
        scheduler=FlowMatchEulerDiscreteScheduler(shift=SHIFT),
        transformer=loaded["dit"],
        expand_timesteps=loaded["dit"].config.in_channels == WIDE_LATENTS,
    )
    pipeline.set_progress_bar_config(disable=True)
    negative = request.negative
    return pipeline(
        prompt_embeds=stages.full_length(request.conditions["prompt_embeds"]),
        negative_prompt_embeds=negative and stages.full_length(negative["prompt_embeds"]),
        guidance_scale=request.cfg_scale,
        height=request.height,
        width=request.width,
        num_frames=request.num_frames,
        num_inference_steps=request.num_inference_steps,
        generator=request.generators,
        output_type="pil",
    ).frames


def _refuse(what: str, do: str, where: str = "extra_inputs") -> ParameterError:
    return ParameterError(what, where=where, do=do)


MASK_CHANNELS = 4
"""Which of the frames are given: one channel for each frame of a latent one."""


def _channels(dit: Shapes) -> tuple[int, int]:
    """Channels that the transformer takes, and those that it predicts."""
    return dit["patch_embedding.weight"][1], dit["proj_out.weight"][0] // PATCH**2


def _check_frames(given: frozenset[str], dit: Shapes) -> None:
    """Compare the frames that `extra_inputs` names with what the transformer takes."""
    channels, predicted = _channels(dit)
    if channels not in (predicted, 2 * predicted + MASK_CHANNELS):
        raise _refuse(
            f"the transformer takes {channels} channels to predict {predicted}: it is given more "
            "than first and last frames (Fun-Control, S2V, Animate), which is not supported",
            "give a T2V, I2V, FLF2V, TI2V or VACE model",
            where="model_paths, model_id_with_origin_paths",
        )
    if "input_image" in given and channels == predicted != WIDE_LATENTS:
        raise _refuse(
            "input_image is named, but this transformer is given no frame",
            "leave it out, or name the files of an I2V model",
        )
    if "end_image" in given and channels == WIDE_LATENTS:
        raise _refuse(
            "end_image is named, but this transformer is given the first frame only", "leave it out"
        )
    if "input_image" not in given and channels > predicted:
        raise _refuse(
            "the transformer is given the first frame of each video, which is not named",
            "name input_image, and end_image for a model that is given the last frame too",
        )


def _check_vace(given: frozenset[str], dit: Shapes) -> None:
    """Compare VACE's inputs that `extra_inputs` names with the transformer."""
    wanted = sorted(name for name in given if name.startswith("vace_"))
    has_blocks = any(name.startswith("vace_blocks.") for name in dit)
    if wanted and not has_blocks:
        raise _refuse(
            f"{' and '.join(wanted)} is named, but the transformer has no VACE blocks",
            "leave it out, or name the files of a VACE model",
        )
    if has_blocks and not wanted:
        raise _refuse(
            "the transformer has VACE blocks, and nothing for them is named",
            "name vace_video or vace_reference_image, or both",
        )


def _names_wide_vae(config: TrainingConfig) -> bool:
    """Whether the model list names the VAE of 16x16, as far as its text tells."""
    texts = [entry.text for entry in model_entries(config)]
    return any(mark in text for text in texts for mark in ("Wan2.2_VAE", "TI2V-5B"))


def _is_wide(vae: Shapes) -> bool:
    """Whether the files of a VAE are those of the one of 16x16."""
    return vae.get("post_quant_conv.weight", (0,))[0] == WIDE_LATENTS


def _geometry(config: TrainingConfig, vae: Shapes) -> Geometry:
    """Sides are multiples of 16, and of 32 with the VAE of 16x16.

    Sizes are checked before files are there, so that this VAE is told from its name; where it is
    called otherwise the size must be given.
    """
    named, wide = _names_wide_vae(config), _is_wide(vae)
    sides = (config.height, config.width)
    if wide and not named and any(side is None or side % WIDE_FACTOR for side in sides):
        raise _refuse(
            f"the sides of a video are multiples of {WIDE_FACTOR} with this VAE",
            f"give height and width, both multiples of {WIDE_FACTOR}",
            where="height, width",
        )
    if not (wide or named):
        return FAMILY.geometry
    # Beside a first frame that is given there must be one to predict.
    least = 1 + stages.FRAMES_PER_LATENT if "input_image" in config.extra_inputs else 1
    frames = FrameRule(stages.FRAMES_PER_LATENT, 1, least)
    return replace(FAMILY.geometry, side_factor=WIDE_FACTOR, frames=frames)


def variant(config: TrainingConfig, shapes: Mapping[str, Shapes]) -> Family:
    """Wan with the stages that a config needs.

    Raises:
        ParameterError: `extra_inputs` does not fit the transformer, a component is missing, or
            the size does not fit the VAE.
    """
    given = frozenset(config.extra_inputs) & frozenset(FAMILY.extra_inputs)
    dit, vae = shapes.get("dit", {}), shapes.get("vae", {})
    first, last = "input_image" in given, "end_image" in given
    if last and not first:
        raise _refuse("end_image is named without input_image", "name both")
    embedder = "condition_embedder.image_embedder."
    features = "image_encoder" in shapes
    if dit:
        _check_frames(given, dit)
        _check_vace(given, dit)
        features = any(name.startswith(embedder) for name in dit)
    encodes = not config.reads_encoded
    if features and first and encodes and "image_encoder" not in shapes:
        raise _refuse(
            "the transformer is told CLIP's features of the first frame, and CLIP is not named",
            "add models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth, or the folder "
            "image_encoder, to the model list",
            where="model_paths, model_id_with_origin_paths",
        )
    reference = (VACE_REFERENCE,) if "vace_reference_image" in given else ()
    video = replace(FAMILY.stage("video"), reads=(VIDEO, *reference))
    wanted = [FAMILY.stage("prompt"), video]
    if first:
        wide = _names_wide_vae(config) or _is_wide(vae)
        in_place = _channels(dit) == (WIDE_LATENTS, WIDE_LATENTS) if dit else wide
        wanted.append(_frames_stage(last, in_place))
    if first and features:
        # Models without an embedding of two positions are told the first frame alone.
        both = last and (not dit or f"{embedder}pos_embed" in dit)
        wanted.append(_features_stage(both))
    if reference or "vace_video" in given:
        shown = VACE_VIDEO if "vace_video" in given else VIDEO
        yields = (Output("vace", "condition"),)
        wanted.append(Stage("vace", (shown, *reference), ("vae",), yields, stages.encode_control))
    return replace(FAMILY, stages=tuple(wanted), geometry=_geometry(config, vae))


def _frames_stage(last: bool, in_place: bool) -> Stage:
    """The stage of the frames that are given.

    Args:
        in_place: they are given in the video itself, not beside it.
    """
    if in_place:
        known = Output("first_frame", "known", of="video")
        return Stage("known_frame", (VIDEO,), ("vae",), (known,), stages.know_first_frame)
    name = "first_and_last_frame" if last else "first_frame"
    yields = (Output("given_frames", "condition"),)
    return Stage(name, (VIDEO,), ("vae",), yields, partial(stages.encode_given_frames, last=last))


def _features_stage(both: bool) -> Stage:
    name = "first_and_last_features" if both else "first_features"
    yields = (Output("features", "condition"),)
    return Stage(
        name, (VIDEO,), ("image_encoder",), yields, partial(stages.encode_features, last=both)
    )


def _aliases(blocks: str) -> Mapping[str, tuple[str, ...]]:
    """The authors' names of the layers in `blocks` → globs of diffusers' names."""
    attention = {"q": "to_q", "k": "to_k", "v": "to_v", "o": "to_out.0"}
    layers = {
        name: tuple(f"{blocks}.*.{attn}.{layer}" for attn in ("attn1", "attn2"))
        for name, layer in attention.items()
    }
    feed = {"ffn.0": "ffn.net.0.proj", "ffn.2": "ffn.net.2"}
    return layers | {name: (f"{blocks}.*.{layer}",) for name, layer in feed.items()}


FAMILY = Family(
    name="wanvideo",
    components=(
        Component(
            "dit",
            "transformer",
            (
                (
                    "condition_embedder.time_embedder.linear_1.weight",
                    "patch_embedding.weight",
                    "proj_out.weight",
                    "scale_shift_table",
                ),
                (
                    "time_embedding.0.weight",
                    "patch_embedding.weight",
                    "head.head.weight",
                    "head.modulation",
                ),
            ),
            ("WanTransformer3DModel", "WanVACETransformer3DModel"),
            modules.build_dit,
            modules.convert_dit,
            ("diffusion_pytorch_model*", "high_noise_model/*", "low_noise_model/*"),
        ),
        Component(
            "text_encoder",
            "text_encoder",
            (
                (
                    "shared.weight",
                    "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
                    "encoder.block.1.layer.0.SelfAttention.relative_attention_bias.weight",
                ),
                ("token_embedding.weight", "blocks.0.pos_embedding.embedding.weight"),
            ),
            ("UMT5EncoderModel",),
            modules.build_text_encoder,
            modules.convert_text_encoder,
            ("models_t5_*",),
        ),
        Component(
            "vae",
            "vae",
            (
                ("encoder.mid_block.attentions.0.to_qkv.weight", "post_quant_conv.weight"),
                ("encoder.middle.1.to_qkv.weight", "encoder.conv1.weight", "conv2.weight"),
            ),
            ("AutoencoderKLWan",),
            modules.build_vae,
            modules.convert_vae,
            ("Wan2.?_VAE.pth",),
        ),
        Component(
            "image_encoder",
            "image_encoder",
            (
                ("vision_model.embeddings.class_embedding", "vision_model.pre_layrnorm.weight"),
                ("embeddings.class_embedding", "pre_layrnorm.weight"),
                ("visual.cls_embedding", "visual.pre_norm.weight"),
            ),
            ("CLIPVisionModel",),
            modules.build_image_encoder,
            modules.convert_image_encoder,
            ("models_clip_*",),
        ),
    ),
    tokenizers=(
        Tokenizer(
            "tokenizer",
            "tokenizer_path",
            "Wan-AI/Wan2.1-T2V-1.3B:google/umt5-xxl/",
            load_tokenizer,
            ("</s>",),
        ),
    ),
    stages=(
        Stage(
            "prompt",
            (Input("prompt", "text"),),
            ("tokenizer", "text_encoder"),
            (Output("prompt_embeds", "condition", ragged=True),),
            stages.encode_prompt,
        ),
        Stage("video", (VIDEO,), ("vae",), (Output("video", "target"),), stages.encode_video),
    ),
    denoiser="dit",
    denoise=stages.denoise,
    path=path,
    geometry=Geometry(side_factor=16, frames=FrameRule(stages.FRAMES_PER_LATENT, 1)),
    sample=sample,
    load_lora=partial(load_into_transformer, WanPipeline),
    inference_sigmas=inference_sigmas,
    lora_targets={"dit": LORA_TARGETS, "vace": LORA_TARGETS},
    lora_aliases={"dit": _aliases("blocks"), "vace": _aliases("vace_blocks")},
    close_lora=modules.close_lora,
    parts=(Part("vace", of="dit", starts=("vace_blocks.", "vace_patch_embedding.")),),
    parameters=("tokenizer_path",),
    extra_inputs=("input_image", "end_image", "vace_video", "vace_reference_image"),
    variant=variant,
    checkpoints_gradients=True,
    repositories=("Wan-AI/Wan2", "PAI/Wan2"),
)
