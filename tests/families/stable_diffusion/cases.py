"""Stable Diffusion 1.5, tiny: with epsilon and v-prediction, and with a ControlNet."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from conftest import write_images
from diffusers import (
    AutoencoderKL,
    ControlNetModel,
    DDIMScheduler,
    StableDiffusionControlNetPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from families.flux.cases import original_vae, randomised
from family_case import Case, first_call
from PIL import Image
from safetensors.torch import save_file

from diffsynth_dagster.families.contract import Tensors

SCHEDULER = {
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "steps_offset": 1,
    "clip_sample": False,
}
V_SCHEDULER = {**SCHEDULER, "prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
ARCHITECTURE: dict[str, Any] = {
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "block_out_channels": (32, 64, 64),
    "layers_per_block": 1,
    "cross_attention_dim": 64,
    "attention_head_dim": 8,
}
UP = ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D")
TEXT: dict[str, Any] = {
    "vocab_size": 514,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 1,
    "bos_token_id": 0,
    "eos_token_id": 2,
}


def write_tokenizer(folder: Path, pad: str = "<|endoftext|>") -> None:
    """Bytes, as CLIP's tokenizer reads them."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import CLIPTokenizer

    letters = sorted(ByteLevel.alphabet())
    special = ["<|startoftext|>", "<|endoftext|>"]
    words = [*letters, *(f"{letter}</w>" for letter in letters), *special]
    vocabulary = {word: index for index, word in enumerate(words)}
    CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=77, pad_token=pad).save_pretrained(
        folder
    )


def tiny_vae(scaling_factor: float) -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(32, 32, 64, 64),
        layers_per_block=1,
        latent_channels=4,
        scaling_factor=scaling_factor,
    )


def reading_its_picture(net: ControlNetModel) -> ControlNetModel:
    """With random values where it begins with zeros, and larger ones where it reads the picture, which
    would change next to nothing otherwise."""
    randomised(net)
    for parameter in net.controlnet_cond_embedding.parameters():
        parameter.data *= 2  # in each of eight layers
    return net


def write(folder: Path) -> None:
    _write(folder, SCHEDULER)


def write_v(folder: Path) -> None:
    """Its whole checkpoint says by two empty tensors what it predicts."""
    _write(folder, V_SCHEDULER, "v_pred", "ztsnr")


def _write(folder: Path, scheduler: Mapping[str, Any], *marks: str) -> None:
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    own = folder / "diffusers"
    write_tokenizer(own / "tokenizer")
    DDIMScheduler(**scheduler).save_pretrained(own / "scheduler")
    unet, vae = UNet2DConditionModel(**ARCHITECTURE, up_block_types=UP), tiny_vae(0.18215)
    clip = CLIPTextModel(CLIPTextConfig(**TEXT))
    unet.save_pretrained(own / "unet")
    vae.save_pretrained(own / "vae")
    clip.save_pretrained(own / "text_encoder")
    net = ControlNetModel(**ARCHITECTURE, conditioning_embedding_out_channels=(8, 8, 16, 16))
    reading_its_picture(net).save_pretrained(folder / "controlnet" / "controlnet")
    whole = original_unet(unet.state_dict(), layers=1)
    whole |= {f"first_stage_model.{n}": t for n, t in original_vae(vae.state_dict()).items()}
    start = "cond_stage_model.transformer.text_model."
    whole |= {start + name: tensor for name, tensor in clip.state_dict().items()}
    whole[f"{start}embeddings.position_ids"] = torch.arange(77)[None]
    save_whole(whole, folder / "original" / "sd.safetensors", *marks)


def save_whole(whole: Tensors, path: Path, *marks: str) -> None:
    """A whole checkpoint, with tensors of the authors' training that no component has."""
    path.parent.mkdir()
    more = {"betas": torch.zeros(1000), "model_ema.decay": torch.zeros(())}
    more |= {mark: torch.zeros(0) for mark in marks}
    tensors = {**whole, **more}
    save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, path)


def original_unet(state: Tensors, layers: int) -> Tensors:
    """The names of the UNet's authors inside a whole checkpoint, written from their models."""
    outside = {
        "conv_in": "input_blocks.0.0",
        "time_embedding.linear_1": "time_embed.0",
        "time_embedding.linear_2": "time_embed.2",
        "add_embedding.linear_1": "label_emb.0.0",
        "add_embedding.linear_2": "label_emb.0.2",
        "conv_norm_out": "out.0",
        "conv_out": "out.2",
    }
    middle = {"resnets.0": "0", "attentions.0": "1", "resnets.1": "2"}
    resnet = {
        "norm1": "in_layers.0",
        "conv1": "in_layers.2",
        "time_emb_proj": "emb_layers.1",
        "norm2": "out_layers.0",
        "conv2": "out_layers.3",
        "conv_shortcut": "skip_connection",
    }
    named: Tensors = {}
    for name, tensor in state.items():
        layer, _, kind = name.rpartition(".")
        place = re.match(r"(down|up)_blocks\.(\d)\.(resnets|attentions)\.(\d)\.(.*)", layer)
        resample = re.match(r"(down|up)_blocks\.(\d)\.(?:down|up)samplers\.0\.conv", layer)
        inside = re.match(r"mid_block\.((?:resnets|attentions)\.\d)\.(.*)", layer)
        if layer in outside:
            new = outside[layer]
        elif place is not None:
            side, level, what, block, rest = place.groups()
            per_level = layers + 1
            index = int(level) * per_level + int(block) + (side == "down")
            rest = resnet[rest] if what == "resnets" else rest
            side = "input" if side == "down" else "output"
            new = f"{side}_blocks.{index}.{int(what == 'attentions')}.{rest}"
        elif resample is not None:
            side, level = resample[1], int(resample[2])
            attends = f"up_blocks.{level}.attentions.0.norm.weight" in state
            index = level * (layers + 1) + layers + (side == "down")
            new = (
                f"input_blocks.{index}.0.op"
                if side == "down"
                else f"output_blocks.{index}.{1 + attends}.conv"
            )
        else:
            assert inside is not None, name
            where, rest = inside.groups()
            rest = resnet[rest] if "resnets" in where else rest
            new = f"middle_block.{middle[where]}.{rest}"
        named[f"model.diffusion_model.{new}.{kind}"] = tensor
    return named


def rows(folder: Path, control: bool = False) -> Path:
    """Four images with captions, and an image for each in `controlnet_image`."""
    table = write_images(folder, 4, [(100, 80)]) / "metadata.csv"
    if control:
        write_images(folder / "more", 4, [(80, 100)])
        lines = table.read_text().splitlines()
        lines[0] += ",controlnet_image"
        lines[1:] = [f"{line},more/{3 - index}.png" for index, line in enumerate(lines[1:])]
        table.write_text("\n".join(lines) + "\n")
    return table


def rows_with_control(folder: Path) -> Path:
    return rows(folder, control=True)


def parts_of(own: Path) -> dict[str, Any]:
    from transformers import CLIPTextModel, CLIPTokenizer

    return {
        "vae": AutoencoderKL.from_pretrained(own / "vae"),
        "text_encoder": CLIPTextModel.from_pretrained(own / "text_encoder"),
        "tokenizer": CLIPTokenizer.from_pretrained(own / "tokenizer"),
        "unet": UNet2DConditionModel.from_pretrained(own / "unet"),
        "scheduler": DDIMScheduler.from_pretrained(own / "scheduler"),
        "safety_checker": None,
        "feature_extractor": None,
        "requires_safety_checker": False,
    }


def first_unet_prediction(
    pipeline: Any, x_t: Tensors, lora: Path | None, **arguments: Any
) -> tuple[Tensors, float]:
    """What the UNet of a pipeline predicts in its first step, and the timestep.

    Args:
        arguments: further ones of the pipeline's call.
    """
    if lora is not None:
        pipeline.load_lora_weights(lora)
    pipeline.set_progress_bar_config(disable=True)
    latents = x_t["image"]
    height, width = latents.shape[-2:]
    with first_call(pipeline.unet) as seen, torch.no_grad():
        pipeline(
            latents=latents[None],
            height=height * 8,
            width=width * 8,
            num_inference_steps=2,
            guidance_scale=1.0,
            output_type="latent",
            **arguments,
        )
    assert torch.equal(seen["args"][0], latents[None])
    return {"image": seen["output"][0]}, float(seen["args"][1])


def control_image(row: Mapping[str, Any]) -> Image.Image:
    """The picture of a row as it is trained on: resized to cover 64x64, and cropped."""
    image = Image.open(row["controlnet_image"]).convert("RGB")
    image = image.resize((64, 80), Image.Resampling.BILINEAR)
    return image.crop((0, 8, 64, 72))


def published(
    folder: Path, row: Mapping[str, Any], x_t: Tensors, lora: Path | None
) -> tuple[Tensors, float]:
    pipeline = StableDiffusionPipeline(**parts_of(folder / "diffusers"))
    return first_unet_prediction(pipeline, x_t, lora, prompt=row["prompt"])


def published_control(
    folder: Path, row: Mapping[str, Any], x_t: Tensors, lora: Path | None
) -> tuple[Tensors, float]:
    net = ControlNetModel.from_pretrained(folder / "controlnet" / "controlnet")
    pipeline = StableDiffusionControlNetPipeline(**parts_of(folder / "diffusers"), controlnet=net)
    return first_unet_prediction(
        pipeline, x_t, lora, prompt=row["prompt"], image=control_image(row)
    )


CONTROLNET = "controlnet/controlnet/diffusion_pytorch_model.safetensors"
TOKENIZER = {"tokenizer_path": "diffusers/tokenizer"}
DIFFUSERS = [
    "diffusers/unet/diffusion_pytorch_model.safetensors",
    "diffusers/text_encoder/model.safetensors",
    "diffusers/vae/diffusion_pytorch_model.safetensors",
]


def layouts(*more: str) -> dict[str, dict[str, Any]]:
    return {
        "diffusers": {"model_paths": [*DIFFUSERS, *more], **TOKENIZER},
        "original": {"model_paths": ["original/sd.safetensors", *more], **TOKENIZER},
    }


COMMON: dict[str, Any] = {
    "family": "stable_diffusion",
    "base": "unet",
    "targets": ("to_q", "to_k", "to_v", "to_out.0", "proj_in", "ff.net.2"),
    "aliases": ("to_q", "to_k", "to_v", "to_out.0", "proj_in", "ff.net.2"),
}
PARAMETERS = {"height": 64, "width": 64, "align_to_opensource_format": True}
CONTROL = {
    "data_file_keys": ["image", "controlnet_image"],
    "extra_inputs": ["controlnet_image"],
}

CASES = (
    Case(
        name="sd15",
        write=write,
        layouts=layouts(),
        rows=rows,
        parameters={**PARAMETERS, "min_snr_gamma": 5.0},
        published=published,
        **COMMON,
    ),
    Case(
        name="sd15_v",
        write=write_v,
        layouts=layouts(),
        rows=rows,
        parameters=PARAMETERS,
        published=published,
        **COMMON,
    ),
    Case(
        name="sd15_controlnet",
        write=write,
        layouts=layouts(CONTROLNET),
        rows=rows_with_control,
        parameters={**PARAMETERS, **CONTROL},
        published=published_control,
        **COMMON,
    ),
)
