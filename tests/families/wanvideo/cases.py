"""Wan 2.1 and 2.2, tiny: video from text, from its first and last frames, and VACE."""

import shutil
import subprocess
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import imageio_ffmpeg
import numpy as np
import torch
from diffusers import (
    AutoencoderKLWan,
    FlowMatchEulerDiscreteScheduler,
    WanImageToVideoPipeline,
    WanPipeline,
    WanTransformer3DModel,
    WanVACEPipeline,
    WanVACETransformer3DModel,
)
from families.wanvideo.original import (
    DIT_NAMES,
    TEXT_NAMES,
    VAE_NAMES,
    count_through,
    original_vision,
    renamed,
)
from families.wanvideo.vision import AuthorsProcessor
from family_case import Case, first_call
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    AutoTokenizer,
    CLIPVisionConfig,
    CLIPVisionModel,
    T5Tokenizer,
    UMT5Config,
    UMT5EncoderModel,
)

from diffsynth_dagster.data.media.image import load_sample_image
from diffsynth_dagster.data.media.video import load_sample_video
from diffsynth_dagster.families.contract import Tensors
from diffsynth_dagster.families.shared.wan_vae import WIDE_MEAN, WIDE_STD

FRAMES = 5
TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2")
ALIASES = ("q", "k", "v", "o", "ffn.0", "ffn.2")
DIT = {
    "num_attention_heads": 1,
    "attention_head_dim": 128,
    "text_dim": 64,
    "ffn_dim": 64,
    "num_layers": 2,
}
WIDE_VAE = {
    "base_dim": 8,
    "decoder_base_dim": 16,
    "z_dim": 48,
    "is_residual": True,
    "in_channels": 12,
    "out_channels": 12,
    "patch_size": 2,
    "scale_factor_spatial": 16,
    "latents_mean": WIDE_MEAN,
    "latents_std": WIDE_STD,
}
MODELS: dict[str, tuple[Any, dict[str, Any]]] = {
    "transformer": (WanTransformer3DModel, DIT),
    "transformer_2": (WanTransformer3DModel, DIT),
    "transformer_i2v": (
        WanTransformer3DModel,
        DIT | {"in_channels": 36, "image_dim": 80, "added_kv_proj_dim": 128},
    ),
    "transformer_flf2v": (
        WanTransformer3DModel,
        DIT
        | {
            "in_channels": 36,
            "image_dim": 80,
            "added_kv_proj_dim": 128,
            "pos_embed_seq_len": 514,
        },
    ),
    "transformer_i2v_low": (WanTransformer3DModel, DIT | {"in_channels": 36}),
    "transformer_ti2v": (WanTransformer3DModel, DIT | {"in_channels": 48, "out_channels": 48}),
    "transformer_vace": (WanVACETransformer3DModel, DIT | {"vace_layers": [0]}),
    "vae": (AutoencoderKLWan, {"base_dim": 8}),
    "vae_wide": (AutoencoderKLWan, WIDE_VAE),
}
"""Folder under `diffusers/` → its class and size."""


def write(folder: Path) -> None:
    """Every module of every variant, in both layouts."""
    torch.manual_seed(0)
    own = folder / "diffusers"
    for name, (kind, options) in MODELS.items():
        module = kind(**options)
        if name.startswith("transformer"):
            for parameter in module.parameters():
                # What starts at zero or one (norms, VACE's projections) must show as well.
                parameter.data += 0.02 * torch.randn_like(parameter)
        module.save_pretrained(own / name)
    text = UMT5Config(vocab_size=300, d_model=64, d_kv=64, d_ff=64, num_layers=2, num_heads=1)
    UMT5EncoderModel(text).save_pretrained(own / "text_encoder")
    CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=80,
            intermediate_size=96,
            num_hidden_layers=3,
            num_attention_heads=1,
            patch_size=14,
            hidden_act="gelu",
        )
    ).save_pretrained(own / "image_encoder")
    letters = [(letter, -3.0) for letter in "abcdefghijklmnopqrstuvwxyz0123456789"]
    start = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    T5Tokenizer(vocab=[*start, *letters], extra_ids=0).save_pretrained(own / "tokenizer")
    _write_original(own, folder / "original")


def _write_original(own: Path, folder: Path) -> None:
    folder.mkdir()
    for name, (kind, _) in MODELS.items():
        tensors = load_file(own / name / "diffusion_pytorch_model.safetensors")
        if kind is AutoencoderKLWan:
            wide = name == "vae_wide"
            counted = {count_through(n, wide): t for n, t in tensors.items()}
            target = folder / ("Wan2.2_VAE.pth" if wide else "Wan2.1_VAE.pth")
            torch.save(renamed(counted, VAE_NAMES), target)
        else:
            (folder / name).mkdir()
            save_file(
                renamed(tensors, DIT_NAMES), folder / name / "diffusion_pytorch_model.safetensors"
            )
    text = load_file(own / "text_encoder" / "model.safetensors")
    torch.save(renamed(text, TEXT_NAMES), folder / "models_t5_umt5-xxl-enc-bf16.pth")
    vision = load_file(own / "image_encoder" / "model.safetensors")
    clip = "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth"
    torch.save(original_vision(vision), folder / clip)
    shutil.copytree(own / "tokenizer", folder / "google" / "umt5-xxl")


def layouts(
    transformer: str, vae: str = "vae", clip: bool = False, second: str | None = None
) -> dict[str, dict[str, Any]]:
    """The files of a variant in both layouts."""
    weights = "diffusion_pytorch_model.safetensors"
    named = {
        "diffusers": [
            f"diffusers/{transformer}/{weights}",
            *([f"diffusers/{second}/{weights}"] if second else []),
            "diffusers/text_encoder/model.safetensors",
            f"diffusers/{vae}/{weights}",
            *(["diffusers/image_encoder/model.safetensors"] if clip else []),
        ],
        "original": [
            f"original/{transformer}/{weights}",
            *([f"original/{second}/{weights}"] if second else []),
            "original/models_t5_umt5-xxl-enc-bf16.pth",
            f"original/{'Wan2.1_VAE' if vae == 'vae' else 'Wan2.2_VAE'}.pth",
            *(["original/models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth"] if clip else []),
        ],
    }
    tokenizers = {"diffusers": "diffusers/tokenizer", "original": "original/google/umt5-xxl"}
    return {
        layout: {"model_paths": files, "tokenizer_path": tokenizers[layout]}
        for layout, files in named.items()
    }


def write_video(path: Path, seed: int, side: int, frames: int = FRAMES, rate: int = 16) -> None:
    """A clip of noise, without loss."""
    pixels = np.random.default_rng(seed).integers(0, 255, (frames, side, side, 3), dtype=np.uint8)
    size = f"{side}x{side}"
    source = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", size, "-r", str(rate), "-i", "-"]
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-y", "-loglevel", "error", *source]
    command += ["-c:v", "libx264", "-qp", "0", str(path)]
    subprocess.run(command, input=pixels.tobytes(), check=True)


def rows(folder: Path, side: int = 32, vace: bool = False) -> Path:
    """Four clips, with VACE's columns where they are wanted."""
    folder.mkdir(parents=True)
    lines = ["video,prompt" + (",vace_video,vace_reference_image" if vace else "")]
    for index in range(4):
        write_video(folder / f"{index}.mp4", index, side)
        line = f'{index}.mp4,"clip {"x" * index} number {index}"'
        if vace:
            write_video(folder / f"control{index}.mp4", index + 10, side)
            pixels = np.random.default_rng(index + 20).integers(0, 255, (side, side, 3))
            Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{index}.png")
            line += f",control{index}.mp4,{index}.png"
        lines.append(line)
    (folder / "metadata.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder / "metadata.csv"


def _pictures(path: str, side: int, frames: int = FRAMES) -> list[Image.Image]:
    """The frames of a clip as they are decoded."""
    video = load_sample_video(Path(path), (side, side), frames, 1.0)
    return [_picture(frame) for frame in video.unbind(1)]


def _picture(frame: torch.Tensor) -> Image.Image:
    pixels = ((frame + 1) * 127.5).round().to(torch.uint8)
    return Image.fromarray(pixels.permute(1, 2, 0).numpy())


def parts(own: Path, transformer: str, vae: str = "vae") -> dict[str, Any]:
    """What every pipeline of diffusers is made of."""
    return {
        "tokenizer": AutoTokenizer.from_pretrained(own / "tokenizer"),
        "text_encoder": UMT5EncoderModel.from_pretrained(own / "text_encoder"),
        "vae": AutoencoderKLWan.from_pretrained(own / vae),
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=5.0),
        "transformer": MODELS[transformer][0].from_pretrained(own / transformer),
    }


def sampled(folder: Path, row: Mapping[str, Any]) -> Tensors:
    """The latents of the clip that the pipeline makes of a row for distillation.

    diffusers' own choice of sigmas ends a little above that of the authors: theirs are passed.
    """
    pipeline: Any = WanPipeline(**parts(folder / "diffusers", "transformer"))
    pipeline.set_progress_bar_config(disable=True)
    choose = pipeline.scheduler.set_timesteps

    def evenly(steps: int, device: Any = None) -> None:
        choose(sigmas=np.linspace(1.0, 1 / steps, steps), device=device)

    pipeline.scheduler.set_timesteps = evenly
    latents = pipeline(
        prompt=row["prompt"],
        generator=torch.Generator(row["rand_device"]).manual_seed(row["seed"]),
        height=32,
        width=32,
        num_frames=FRAMES,
        num_inference_steps=row["num_inference_steps"],
        guidance_scale=1.0,
        output_type="latent",
    ).frames
    return {"video": latents[0]}


def published(
    folder: Path,
    row: Mapping[str, Any],
    x_t: Tensors,
    lora: Path | None,
    *,
    make: Any,
    transformer: str,
    inputs: Callable[[Mapping[str, Any]], dict[str, Any]] = lambda row: {},
    vae: str = "vae",
    clip: bool = False,
    side: int = 32,
    **options: Any,
) -> tuple[Tensors, float]:
    """What a pipeline of diffusers predicts at its first step."""
    own = folder / "diffusers"
    if clip:
        encoder = CLIPVisionModel.from_pretrained(own / "image_encoder")
        options |= {"image_encoder": encoder, "image_processor": AuthorsProcessor()}
    pipeline = make(**parts(own, transformer, vae), **options)
    if lora is not None:
        pipeline.load_lora_weights(lora)
    pipeline.set_progress_bar_config(disable=True)
    with first_call(pipeline.transformer) as seen, torch.no_grad():
        pipeline(
            prompt=row["prompt"],
            latents=x_t["video"][None],
            height=side,
            width=side,
            num_frames=FRAMES,
            num_inference_steps=2,
            guidance_scale=1.0,
            output_type="latent",
            **inputs(row),
        )
    return {"video": seen["output"][0]}, float(seen["kwargs"]["timestep"].max())


def first_frame(row: Mapping[str, Any], side: int = 32) -> dict[str, Any]:
    return {"image": _pictures(row["video"], side)[0]}


def both_frames(row: Mapping[str, Any]) -> dict[str, Any]:
    frames = _pictures(row["video"], 32)
    return {"image": frames[0], "last_image": frames[-1]}


def control(row: Mapping[str, Any]) -> dict[str, Any]:
    reference = load_sample_image(Path(row["vace_reference_image"]), (32, 32))
    return {"video": _pictures(row["vace_video"], 32), "reference_images": [_picture(reference)]}


def _case(
    name: str,
    transformer: str,
    make: Any,
    parameters: Mapping[str, Any] | None = None,
    inputs: Callable[[Mapping[str, Any]], dict[str, Any]] = lambda row: {},
    clip: bool = False,
    **others: Any,
) -> Case:
    predict = partial(published, make=make, transformer=transformer, inputs=inputs, clip=clip)
    return Case(
        **{
            "name": name,
            "family": "wanvideo",
            "write": write,
            "layouts": layouts(transformer, clip=clip),
            "rows": rows,
            "parameters": {"height": 32, "width": 32, "num_frames": FRAMES, **(parameters or {})},
            "targets": TARGETS,
            "aliases": ALIASES,
            "published": predict,
            **others,
        }
    )


FIRST = {"extra_inputs": ["input_image"]}
CASES = (
    _case("wan_t2v", "transformer", WanPipeline),
    _case("wan_i2v", "transformer_i2v", WanImageToVideoPipeline, FIRST, first_frame, clip=True),
    _case(
        "wan_flf2v",
        "transformer_flf2v",
        WanImageToVideoPipeline,
        {"extra_inputs": ["input_image", "end_image"]},
        both_frames,
        clip=True,
    ),
    _case("wan22_t2v_high", "transformer_2", WanPipeline, {"max_timestep_boundary": 0.417}),
    _case(
        "wan22_t2v_both",
        "transformer",
        WanPipeline,
        {"lora_base_model": ["dit", "dit2"]},
        layouts=layouts("transformer", second="transformer_2"),
    ),
    _case(
        "wan22_i2v_low",
        "transformer_i2v_low",
        WanImageToVideoPipeline,
        {"min_timestep_boundary": 0.358, **FIRST},
        first_frame,
    ),
    _case(
        "wan22_ti2v_5b",
        "transformer_ti2v",
        WanImageToVideoPipeline,
        {"height": 64, "width": 64, **FIRST},
        layouts=layouts("transformer_ti2v", "vae_wide"),
        rows=partial(rows, side=64),
        published=partial(
            published,
            make=WanImageToVideoPipeline,
            transformer="transformer_ti2v",
            inputs=partial(first_frame, side=64),
            vae="vae_wide",
            side=64,
            expand_timesteps=True,
        ),
    ),
    _case(
        "wan_vace",
        "transformer_vace",
        WanVACEPipeline,
        {
            "extra_inputs": ["vace_video", "vace_reference_image"],
            "data_file_keys": ["video", "vace_video", "vace_reference_image"],
        },
        control,
        rows=partial(rows, vace=True),
        base="vace",
    ),
)
