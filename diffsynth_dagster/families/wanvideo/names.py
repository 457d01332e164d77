"""The names that the authors of Wan give its tensors and layers → those of diffusers and
transformers, and of the layers that get a LoRA.

Two layouts are read: the folders of diffusers, and the files of the repositories Wan-AI/Wan2.1-…
and Wan-AI/Wan2.2-…. A converter leaves the names of diffusers and transformers alone.
"""

import re
from collections.abc import Mapping

from diffusers.loaders import single_file_utils

from diffsynth_dagster.families.contract import Tensors
from diffsynth_dagster.families.shared.names import with_new_start, with_new_starts

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
_TEXT_TOP = {"token_embedding.": "shared.", "norm.": "encoder.final_layer_norm."}
_VISION_TOP = {
    "patch_embedding.": "embeddings.patch_embedding.",
    "pre_norm.": "pre_layrnorm.",
    "post_norm.": "post_layernorm.",
}


def convert_dit(tensors: Tensors) -> Tensors:
    """The names of `diffusion_pytorch_model*.safetensors` of the authors → those of diffusers."""
    return _renamed(tensors) if any(".self_attn." in name for name in tensors) else tensors


def from_authors(tensors: Tensors) -> Tensors:
    """A LoRA by the authors' names → by those of diffusers.

    A LoRA by diffusers' names stays as it is: the only names that mean another layer there are
    those of norms, and no LoRA is put on a norm.
    """
    return _renamed(tensors)


def _renamed(tensors: Tensors) -> Tensors:
    return {
        name.replace("img_emb.emb_pos", "condition_embedder.image_embedder.pos_embed"): tensor
        for name, tensor in single_file_utils.convert_wan_transformer_to_diffusers(
            dict(tensors)
        ).items()
    }


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
    return f"{start}resnets.{index}.{with_new_start(rest, _RESNET)}"


def convert_vae(tensors: Tensors) -> Tensors:
    """The names of `Wan2.1_VAE.pth` and `Wan2.2_VAE.pth` → those of diffusers."""
    residual = {_residual_name(name): tensor for name, tensor in tensors.items()}
    return single_file_utils.convert_wan_vae_to_diffusers(residual)


def convert_text_encoder(tensors: Tensors) -> Tensors:
    """The names of `models_t5_umt5-xxl-enc-bf16.pth` → those of transformers."""
    renamed: Tensors = {}
    for name, tensor in tensors.items():
        if name.startswith("blocks."):
            _, index, rest = name.split(".", 2)
            name = f"encoder.block.{index}.{with_new_start(rest, _TEXT)}"
        renamed[with_new_start(name, _TEXT_TOP)] = tensor
    return renamed


def convert_image_encoder(tensors: Tensors) -> Tensors:
    """The names of `models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth`, or of transformers'
    older files (`vision_model.…`) → those of transformers. The text tower, the projection and the
    temperature, which Wan does not use, are left out."""
    if not any(name.startswith("visual.") for name in tensors):
        return with_new_starts(tensors, {"vision_model.": ""})
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
                renamed[layer + with_new_start(rest, _VISION)] = tensor
        else:
            renamed[with_new_start(name, _VISION_TOP)] = tensor
    return renamed


def lora_aliases(blocks: str) -> Mapping[str, tuple[str, ...]]:
    """The authors' names of the layers in `blocks` → globs of diffusers' names."""
    attention = {"q": "to_q", "k": "to_k", "v": "to_v", "o": "to_out.0"}
    layers = {
        name: tuple(f"{blocks}.*.{attn}.{layer}" for attn in ("attn1", "attn2"))
        for name, layer in attention.items()
    }
    feed = {"ffn.0": "ffn.net.0.proj", "ffn.2": "ffn.net.2"}
    return layers | {name: (f"{blocks}.*.{layer}",) for name, layer in feed.items()}
