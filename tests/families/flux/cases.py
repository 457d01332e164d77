"""FLUX.1 with reference images and ControlNets, tiny."""

import re
from collections.abc import Mapping
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from conftest import write_images
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxControlNetModel,
    FluxControlNetPipeline,
    FluxKontextPipeline,
    FluxPipeline,
    FluxTransformer2DModel,
)
from family_case import Case, first_prediction
from PIL import Image
from safetensors.torch import save_file

from diffsynth_dagster.families.contract import Tensors
from diffsynth_dagster.families.flux.family import SCHEDULER
from diffsynth_dagster.families.flux.stages import MODES
from diffsynth_dagster.families.shared.packing import unpack

ARCHITECTURE = {
    "in_channels": 16,
    "attention_head_dim": 32,
    "num_attention_heads": 2,
    "joint_attention_dim": 64,
    "pooled_projection_dim": 64,
    "guidance_embeds": True,
    "axes_dims_rope": (4, 14, 14),
}


def write_tokenizers(folder: Path) -> None:
    """Bytes for CLIP, letters for T5."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import CLIPTokenizer, T5TokenizerFast

    letters = sorted(ByteLevel.alphabet())
    special = ["<|startoftext|>", "<|endoftext|>"]
    words = [*letters, *(f"{letter}</w>" for letter in letters), *special]
    CLIPTokenizer(
        vocab={word: index for index, word in enumerate(words)}, merges=[], model_max_length=77
    ).save_pretrained(folder / "tokenizer")
    pieces = ["<pad>", "</s>", "<unk>", "▁", *"abcdefghijklmnopqrstuvwxyz0123456789"]
    T5TokenizerFast(vocab=[(piece, -1.0) for piece in pieces], extra_ids=0).save_pretrained(
        folder / "tokenizer_2"
    )


def randomised(module: Any) -> Any:
    """With random values where a ControlNet begins with zeros."""
    for parameter in module.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.05)
    return module


def write(folder: Path) -> None:
    from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

    torch.manual_seed(0)
    own = folder / "diffusers"
    write_tokenizers(own)
    dit = FluxTransformer2DModel(**ARCHITECTURE, num_layers=2, num_single_layers=2)
    dit.save_pretrained(own / "transformer")
    for name, modes in (("controlnet", None), ("union", 10)):
        net = FluxControlNetModel(**ARCHITECTURE, num_layers=1, num_single_layers=1, num_mode=modes)
        randomised(net).save_pretrained(folder / name / "controlnet")
    clip = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=514,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=1,
            bos_token_id=0,
            eos_token_id=2,
        )
    )
    clip.save_pretrained(own / "text_encoder")
    t5 = T5EncoderModel(
        T5Config(
            vocab_size=40,
            d_model=64,
            d_kv=16,
            d_ff=96,
            num_layers=2,
            num_heads=4,
            feed_forward_proj="gated-gelu",
        )
    )
    t5.save_pretrained(own / "text_encoder_2", max_shard_size="100KB")
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(32, 32, 64, 64),
        layers_per_block=1,
        latent_channels=4,
        scaling_factor=0.3611,
        shift_factor=0.1159,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    # The published pipelines draw a ControlNet's latents from the posterior: here it has no spread.
    torch.nn.init.zeros_(vae.encoder.conv_out.weight.data[4:])
    torch.nn.init.constant_(vae.encoder.conv_out.bias.data[4:], -30.0)
    vae.save_pretrained(own / "vae")
    original = folder / "original"
    (original / "text_encoder").mkdir(parents=True)
    save_file(original_dit(dit.state_dict()), original / "flux1-dev.safetensors")
    save_file(original_vae(vae.state_dict()), original / "ae.safetensors")
    save_file(
        {f"text_model.{name}": tensor for name, tensor in clip.state_dict().items()},
        original / "text_encoder" / "model.safetensors",
    )


DOUBLE = {
    "norm1.linear": "img_mod.lin",
    "norm1_context.linear": "txt_mod.lin",
    "attn.to_out.0": "img_attn.proj",
    "attn.to_add_out": "txt_attn.proj",
    "ff.net.0.proj": "img_mlp.0",
    "ff.net.2": "img_mlp.2",
    "ff_context.net.0.proj": "txt_mlp.0",
    "ff_context.net.2": "txt_mlp.2",
    "attn.norm_q": "img_attn.norm.query_norm",
    "attn.norm_k": "img_attn.norm.key_norm",
    "attn.norm_added_q": "txt_attn.norm.query_norm",
    "attn.norm_added_k": "txt_attn.norm.key_norm",
}
SINGLE = {
    "norm.linear": "modulation.lin",
    "proj_out": "linear2",
    "attn.norm_q": "norm.query_norm",
    "attn.norm_k": "norm.key_norm",
}
OUTSIDE = {
    "x_embedder": "img_in",
    "context_embedder": "txt_in",
    "time_text_embed.timestep_embedder.linear_1": "time_in.in_layer",
    "time_text_embed.timestep_embedder.linear_2": "time_in.out_layer",
    "time_text_embed.text_embedder.linear_1": "vector_in.in_layer",
    "time_text_embed.text_embedder.linear_2": "vector_in.out_layer",
    "time_text_embed.guidance_embedder.linear_1": "guidance_in.in_layer",
    "time_text_embed.guidance_embedder.linear_2": "guidance_in.out_layer",
    "proj_out": "final_layer.linear",
    "norm_out.linear": "final_layer.adaLN_modulation.1",
}
FUSED = {
    "double_blocks.{}.img_attn.qkv": [f"transformer_blocks.{{}}.attn.to_{x}" for x in "qkv"],
    "double_blocks.{}.txt_attn.qkv": [f"transformer_blocks.{{}}.attn.add_{x}_proj" for x in "qkv"],
    "single_blocks.{}.linear1": [
        *(f"single_transformer_blocks.{{}}.attn.to_{x}" for x in "qkv"),
        "single_transformer_blocks.{}.proj_mlp",
    ],
}


def original_dit(state: Tensors) -> Tensors:
    """The authors' names, written from their published model."""
    named: Tensors = {}
    for name, tensor in state.items():
        layer, _, kind = name.rpartition(".")
        block = re.fullmatch(r"(single_)?transformer_blocks\.(\d+)\.(.+)", layer)
        if block is None:
            start, there = "", OUTSIDE[layer]
        else:
            start = f"{'single' if block[1] else 'double'}_blocks.{block[2]}."
            there = (SINGLE if block[1] else DOUBLE).get(block[3])
        if there is None:
            continue  # it is fused with others
        if layer == "norm_out.linear":
            scale, shift = tensor.chunk(2)
            tensor = torch.cat([shift, scale])
        named[f"{start}{there}.{'scale' if there.endswith('_norm') else kind}"] = tensor
    for there, parts in FUSED.items():
        for i, kind in product(range(2), ("weight", "bias")):
            whole = [state[f"{part.format(i)}.{kind}"] for part in parts]
            named[f"{there.format(i)}.{kind}"] = torch.cat(whole)
    return {name: tensor.contiguous() for name, tensor in named.items()}


def original_vae(state: Tensors) -> Tensors:
    """The names of the autoencoder's authors."""
    named: Tensors = {}
    for name, tensor in state.items():
        name = re.sub(r"down_blocks\.(\d)\.resnets", r"down.\1.block", name)
        name = re.sub(r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample", name)
        up = re.search(r"up_blocks\.(\d)", name)
        if up is not None:
            name = name.replace(up[0], f"up.{3 - int(up[1])}")
            name = name.replace(".resnets.", ".block.").replace("upsamplers.0", "upsample")
        name = re.sub(
            r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", name
        ).replace("conv_shortcut", "nin_shortcut")
        if "mid_block.attentions.0" in name:
            name = name.replace("mid_block.attentions.0", "mid.attn_1")
            name = name.replace("to_out.0", "proj_out").replace("group_norm", "norm")
            name = re.sub(r"to_([qkv])", r"\1", name)
            if tensor.ndim == 2:
                tensor = tensor[:, :, None, None]
        named[name.replace("conv_norm_out", "norm_out")] = tensor.contiguous()
    return named


T5_SHARDS = "diffusers/text_encoder_2/model-*.safetensors"
TOKENIZERS = {
    "tokenizer_1_path": "diffusers/tokenizer",
    "tokenizer_2_path": "diffusers/tokenizer_2",
}
DIFFUSERS = [
    "diffusers/transformer/diffusion_pytorch_model.safetensors",
    "diffusers/text_encoder/model.safetensors",
    T5_SHARDS,
    "diffusers/vae/diffusion_pytorch_model.safetensors",
]
ORIGINAL = [
    "original/flux1-dev.safetensors",
    "original/text_encoder/model.safetensors",
    T5_SHARDS,
    "original/ae.safetensors",
]


def layouts(*more: str) -> dict[str, dict[str, Any]]:
    return {
        "diffusers": {"model_paths": [*DIFFUSERS, *more], **TOKENIZERS},
        "original": {"model_paths": [*ORIGINAL, *more], **TOKENIZERS},
    }


def rows(
    folder: Path, column: str | None = None, size: tuple[int, int] = (32, 32), mode: bool = False
) -> Path:
    """Four images with captions, and an image of `size` for each in another column."""
    table = write_images(folder, 4) / "metadata.csv"
    if column is None:
        return table
    write_images(folder / "more", 4, [size])
    lines = table.read_text().splitlines()
    lines[0] += f",{column}" + (",controlnet_processor_id" if mode else "")
    for index in range(4):
        lines[index + 1] += f",more/{3 - index}.png" + (f",{MODES[index + 1]}" if mode else "")
    table.write_text("\n".join(lines) + "\n")
    return table


def parts_of(own: Path) -> dict[str, Any]:
    from transformers import CLIPTextModel, CLIPTokenizer, T5EncoderModel, T5TokenizerFast

    return {
        "scheduler": FlowMatchEulerDiscreteScheduler.from_config(SCHEDULER),
        "vae": AutoencoderKL.from_pretrained(own / "vae"),
        "text_encoder": CLIPTextModel.from_pretrained(own / "text_encoder"),
        "tokenizer": CLIPTokenizer.from_pretrained(own / "tokenizer"),
        "text_encoder_2": T5EncoderModel.from_pretrained(own / "text_encoder_2"),
        "tokenizer_2": T5TokenizerFast.from_pretrained(own / "tokenizer_2"),
        "transformer": FluxTransformer2DModel.from_pretrained(own / "transformer"),
    }


def published(
    folder: Path, row: Mapping[str, Any], x_t: Tensors, lora: Path | None
) -> tuple[Tensors, float]:
    pipeline = FluxPipeline(**parts_of(folder / "diffusers"))
    return first_prediction(pipeline, x_t, lora, prompt=row["prompt"], guidance_scale=1.0)


def published_kontext(
    folder: Path, row: Mapping[str, Any], x_t: Tensors, lora: Path | None
) -> tuple[Tensors, float]:
    height, width = (side * 8 for side in x_t["image"].shape[-2:])
    return first_prediction(
        FluxKontextPipeline(**parts_of(folder / "diffusers")),
        x_t,
        lora,
        prompt=row["prompt"],
        guidance_scale=1.0,
        image=Image.open(row["kontext_images"][0]),
        max_area=height * width,
        _auto_resize=False,
    )


def published_control(
    folder: Path, row: Mapping[str, Any], x_t: Tensors, lora: Path | None, net: str
) -> tuple[Tensors, float]:
    controlnet = FluxControlNetModel.from_pretrained(folder / net / "controlnet")
    mode = row.get("controlnet_processor_id")
    return first_prediction(
        FluxControlNetPipeline(**parts_of(folder / "diffusers"), controlnet=controlnet),
        x_t,
        lora,
        prompt=row["prompt"],
        guidance_scale=1.0,
        control_image=Image.open(row["controlnet_image"]),
        control_mode=None if mode is None else MODES.index(mode),
    )


def sampled(folder: Path, row: Mapping[str, Any]) -> Tensors:
    """The latents of the image that the pipeline makes of a row for distillation."""
    pipeline: Any = FluxPipeline(**parts_of(folder / "diffusers"))
    pipeline.set_progress_bar_config(disable=True)
    tokens = pipeline(
        prompt=row["prompt"],
        generator=torch.Generator(row["rand_device"]).manual_seed(row["seed"]),
        height=32,
        width=32,
        num_inference_steps=row["num_inference_steps"],
        guidance_scale=1.0,
        output_type="latent",
    ).images
    return {"image": unpack(tokens, 4, 4)[0]}


COMMON: dict[str, Any] = {
    "family": "flux",
    "write": write,
    "targets": (
        *(f"transformer_blocks.{i}.attn.to_{x}" for i in range(2) for x in "qkv"),
        "to_add_out",
        "ff.net.2",
        "norm.linear",
    ),
    "aliases": ("a_to_qkv", "b_to_out", "ff_a.2", "norm.linear"),
}
OPEN = {"align_to_opensource_format": True}
CONTROL = {"data_file_keys": ["image", "controlnet_image"]}
CONTROLNET = "controlnet/diffusion_pytorch_model.safetensors"

CASES = (
    Case(
        name="flux",
        layouts=layouts(),
        rows=rows,
        parameters={"height": 32, "width": 32, **OPEN},
        published=published,
        **COMMON,
    ),
    Case(
        name="flux_kontext",
        layouts=layouts(),
        rows=partial(rows, column="kontext_images", size=(32, 48)),
        parameters={
            "data_file_keys": ["image", "kontext_images"],
            "extra_inputs": ["kontext_images"],
            **OPEN,
        },
        published=published_kontext,
        **COMMON,
    ),
    Case(
        name="flux_controlnet",
        layouts=layouts(f"controlnet/{CONTROLNET}"),
        rows=partial(rows, column="controlnet_image", size=(32, 32)),
        parameters={"extra_inputs": ["controlnet_image"], **CONTROL, **OPEN},
        published=partial(published_control, net="controlnet"),
        **COMMON,
    ),
    Case(
        name="flux_controlnet_union",
        layouts=layouts(f"union/{CONTROLNET}"),
        rows=partial(rows, column="controlnet_image", size=(32, 32), mode=True),
        parameters={
            "extra_inputs": ["controlnet_image", "controlnet_processor_id"],
            **CONTROL,
            **OPEN,
        },
        published=partial(published_control, net="union"),
        **COMMON,
    ),
)
