"""The modules of Wan: their architecture, and the names that the authors' files give them.

Two layouts are read: the folders of diffusers, and the files of the repositories Wan-AI/Wan2.1-…
and Wan-AI/Wan2.2-…. A converter leaves the names of diffusers and transformers alone.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any

from diffusers import AutoencoderKLWan, WanTransformer3DModel, WanVACETransformer3DModel
from diffusers.loaders import single_file_utils
from torch import nn
from transformers import CLIPVisionConfig, CLIPVisionModel, UMT5Config, UMT5EncoderModel

from diffsynth_dagster.families.contract import Shapes, Tensors
from diffsynth_dagster.families.shared.support import count_blocks, from_config, t5_settings

PATCH = 2
HEAD = 128
VISION_HEAD = 80
WIDE_LATENTS = 48
"""Latent channels of Wan2.2's VAE of 16x16x4, which first folds patches of 2x2 pixels."""

# Wan2.2_VAE.pth does not hold these; they are those of Wan-AI/Wan2.2-TI2V-5B-Diffusers.
_WIDE_MEAN = """
    -0.2289 -0.0052 -0.1323 -0.2339 -0.2799  0.0174  0.1838  0.1557 -0.1382  0.0542  0.2813  0.0891
     0.1570 -0.0098  0.0375 -0.1825 -0.2246 -0.1207 -0.0698  0.5109  0.2665 -0.2108 -0.2158  0.2502
    -0.2055 -0.0322  0.1109  0.1567 -0.0729  0.0899 -0.2799 -0.1230 -0.0313 -0.1649  0.0117  0.0723
    -0.2839 -0.2083 -0.0520  0.3748  0.0152  0.1957  0.1433 -0.2944  0.3573 -0.0548 -0.1681 -0.0667
"""
_WIDE_STD = """
    0.4765 1.0364 0.4514 1.1677 0.5313 0.4990 0.4818 0.5013 0.8158 1.0344 0.5894 1.0901
    0.6885 0.6165 0.8454 0.4978 0.5759 0.3523 0.7135 0.6804 0.5833 1.4146 0.8986 0.5659
    0.7069 0.5338 0.4889 0.4917 0.4069 0.4999 0.6866 0.4093 0.5709 0.6065 0.6415 0.4944
    0.5726 1.2042 0.5458 1.6887 0.3971 1.0600 0.3943 0.5537 0.5444 0.4089 0.7468 0.7744
"""

_VAE_RESIDUAL = re.compile(r"^(encoder|decoder)\.(?:down|up)samples\.(\d+)\.(?:down|up)samples\.")
_RESNET = {
    "residual.0.": "norm1.",
    "residual.2.": "conv1.",
    "residual.3.": "norm2.",
    "residual.6.": "conv2.",
    "shortcut.": "conv_shortcut.",
}
_TEXT = {
    "norm1.": "layer.0.layer_norm.",
    "attn.": "layer.0.SelfAttention.",
    "pos_embedding.embedding.": "layer.0.SelfAttention.relative_attention_bias.",
    "norm2.": "layer.1.layer_norm.",
    "ffn.gate.0.": "layer.1.DenseReluDense.wi_0.",
    "ffn.fc1.": "layer.1.DenseReluDense.wi_1.",
    "ffn.fc2.": "layer.1.DenseReluDense.wo.",
}
_VISION = {
    "norm1.": "layer_norm1.",
    "attn.proj.": "self_attn.out_proj.",
    "norm2.": "layer_norm2.",
    "mlp.0.": "mlp.fc1.",
    "mlp.2.": "mlp.fc2.",
}


def _restart(name: str, starts: Mapping[str, str]) -> str:
    """A name whose start is exchanged, if it has one of these."""
    for old, new in starts.items():
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name


def convert_dit(tensors: Tensors) -> Tensors:
    """The names of `diffusion_pytorch_model*.safetensors` of the authors → those of diffusers."""
    return _from_authors(tensors) if any(".self_attn." in name for name in tensors) else tensors


def close_lora(tensors: Tensors) -> Tensors:
    """A LoRA by the authors' names → by those of diffusers.

    The only names that both have for different layers are those of norms, which no LoRA is of, so
    that a LoRA by diffusers' names stays as it is.
    """
    return _from_authors(tensors)


def _from_authors(tensors: Tensors) -> Tensors:
    convert: Any = single_file_utils.convert_wan_transformer_to_diffusers
    return {
        name.replace("img_emb.emb_pos", "condition_embedder.image_embedder.pos_embed"): tensor
        for name, tensor in convert(dict(tensors)).items()
    }


def build_dit(shapes: Shapes, config: Mapping[str, Any] | None) -> nn.Module:
    """The transformer, with VACE's blocks where there are any. From shapes, a head has the 128
    channels of every published size, and VACE's blocks stand beside evenly spread layers."""
    vace = count_blocks(shapes, "vace_blocks.")
    kind: Callable[..., nn.Module] = WanVACETransformer3DModel if vace else WanTransformer3DModel
    if config is not None:
        return from_config(kind, config)
    inner, in_channels = shapes["patch_embedding.weight"][:2]
    layers = count_blocks(shapes, "blocks.")
    embedder = "condition_embedder."
    options: dict[str, Any] = {}
    if f"{embedder}image_embedder.norm1.weight" in shapes:
        options["image_dim"] = shapes[f"{embedder}image_embedder.norm1.weight"][0]
        options["added_kv_proj_dim"] = inner
        options["pos_embed_seq_len"] = shapes.get(f"{embedder}image_embedder.pos_embed", (1, None))[
            1
        ]
    if vace:
        options["vace_layers"] = list(range(0, layers, -(-layers // vace)))
        options["vace_in_channels"] = 2 * in_channels + 64
    return kind(
        num_attention_heads=inner // HEAD,
        attention_head_dim=HEAD,
        in_channels=in_channels,
        out_channels=shapes["proj_out.weight"][0] // PATCH**2,
        text_dim=shapes[f"{embedder}text_embedder.linear_1.weight"][1],
        freq_dim=shapes[f"{embedder}time_embedder.linear_1.weight"][1],
        ffn_dim=shapes["blocks.0.ffn.net.0.proj.weight"][0],
        num_layers=layers,
        **options,
    )


def _residual_name(name: str) -> str:
    """A name of `Wan2.2_VAE.pth` inside its nested blocks; of any other tensor, itself.

    `encoder.downsamples.<i>.downsamples.<j>.…`: the residual blocks come first, and then what
    changes the size.
    """
    match = _VAE_RESIDUAL.match(name)
    if match is None:
        return name
    side, block, rest = match[1], match[2], name[match.end() :]
    index, _, rest = rest.partition(".")
    way = "down" if side == "encoder" else "up"
    start = f"{side}.{way}_blocks.{block}."
    if rest.startswith(("resample.", "time_conv.")):
        return f"{start}{way}sampler.{rest}"
    return f"{start}resnets.{index}.{_restart(rest, _RESNET)}"


def convert_vae(tensors: Tensors) -> Tensors:
    """The names of `Wan2.1_VAE.pth` and `Wan2.2_VAE.pth` → those of diffusers."""
    convert: Any = single_file_utils.convert_wan_vae_to_diffusers
    return convert({_residual_name(name): tensor for name, tensor in tensors.items()})


def build_vae(shapes: Shapes, config: Mapping[str, Any] | None) -> nn.Module:
    """The video VAE. From shapes, the mean and deviation of the latents are the published ones.

    Raises:
        ValueError: none are published for this number of channels.
    """
    if config is not None:
        return from_config(AutoencoderKLWan, config)
    base, in_channels = shapes["encoder.conv_in.weight"][:2]
    channels = shapes["post_quant_conv.weight"][0]
    options: dict[str, Any] = {}
    if channels == WIDE_LATENTS:
        options["latents_mean"] = [float(value) for value in _WIDE_MEAN.split()]
        options["latents_std"] = [float(value) for value in _WIDE_STD.split()]
    elif channels != 16:
        raise ValueError(f"the mean and deviation of latents of {channels} channels are not known")
    if in_channels > 3:
        options |= {"patch_size": PATCH, "scale_factor_spatial": 16}
    return AutoencoderKLWan(
        base_dim=base,
        decoder_base_dim=shapes["decoder.norm_out.gamma"][0],
        z_dim=channels,
        in_channels=in_channels,
        out_channels=in_channels,
        is_residual="encoder.down_blocks.0.resnets.0.conv1.weight" in shapes,
        **options,
    )


def convert_text_encoder(tensors: Tensors) -> Tensors:
    """The names of `models_t5_umt5-xxl-enc-bf16.pth` → those of transformers."""
    renamed: Tensors = {}
    for name, tensor in tensors.items():
        if name.startswith("blocks."):
            _, index, rest = name.split(".", 2)
            name = f"encoder.block.{index}.{_restart(rest, _TEXT)}"
        tops = {"token_embedding.": "shared.", "norm.": "encoder.final_layer_norm."}
        renamed[_restart(name, tops)] = tensor
    return renamed


def build_text_encoder(shapes: Shapes, config: Mapping[str, Any] | None) -> nn.Module:
    """UMT5's encoder."""
    if config is not None:
        return UMT5EncoderModel(UMT5Config.from_dict(dict(config)))
    return UMT5EncoderModel(UMT5Config(**t5_settings(shapes)))


def convert_image_encoder(tensors: Tensors) -> Tensors:
    """The names of `models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth`, or of transformers'
    older files (`vision_model.…`) → those of transformers. The text tower, the projection and the
    temperature, which Wan does not use, are left out."""
    if not any(name.startswith("visual.") for name in tensors):
        return {name.removeprefix("vision_model."): tensor for name, tensor in tensors.items()}
    tops = {
        "patch_embedding.": "embeddings.patch_embedding.",
        "pre_norm.": "pre_layrnorm.",
        "post_norm.": "post_layernorm.",
    }
    renamed: Tensors = {}
    for name, tensor in tensors.items():
        part, _, name = name.partition(".")
        if part != "visual" or name == "head":
            continue
        if name == "cls_embedding":
            renamed["embeddings.class_embedding"] = tensor.flatten()
        elif name == "pos_embedding":
            renamed["embeddings.position_embedding.weight"] = tensor.squeeze(0)
        elif name.startswith("transformer."):
            _, index, rest = name.split(".", 2)
            layer = f"encoder.layers.{index}."
            if rest.startswith("attn.to_qkv."):
                kind = rest.removeprefix("attn.to_qkv.")
                for letter, third in zip("qkv", tensor.chunk(3), strict=True):
                    renamed[f"{layer}self_attn.{letter}_proj.{kind}"] = third
            else:
                renamed[layer + _restart(rest, _VISION)] = tensor
        else:
            renamed[_restart(name, tops)] = tensor
    return renamed


def build_image_encoder(shapes: Shapes, config: Mapping[str, Any] | None) -> nn.Module:
    """CLIP's vision tower. From shapes, a head has the 80 channels and the activation is that of
    the published ViT-H/14."""
    if config is not None:
        return CLIPVisionModel(CLIPVisionConfig.from_dict(dict(config)))
    hidden, _, patch, _ = shapes["embeddings.patch_embedding.weight"]
    tokens = shapes["embeddings.position_embedding.weight"][0]
    return CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=hidden,
            intermediate_size=shapes["encoder.layers.0.mlp.fc1.weight"][0],
            num_hidden_layers=count_blocks(shapes, "encoder.layers."),
            num_attention_heads=hidden // VISION_HEAD,
            image_size=int((tokens - 1) ** 0.5) * patch,
            patch_size=patch,
            hidden_act="gelu",
        )
    )
