"""The names that the authors of Wan give its tensors, written from their published model."""

import re

import torch

from diffsynth_dagster.families.contract import Tensors

DIT_NAMES = (
    ("condition_embedder.image_embedder.norm1", "img_emb.proj.0"),
    ("condition_embedder.image_embedder.ff.net.0.proj", "img_emb.proj.1"),
    ("condition_embedder.image_embedder.ff.net.2", "img_emb.proj.3"),
    ("condition_embedder.image_embedder.norm2", "img_emb.proj.4"),
    ("condition_embedder.image_embedder.pos_embed", "img_emb.emb_pos"),
    ("condition_embedder.time_embedder.linear_1", "time_embedding.0"),
    ("condition_embedder.time_embedder.linear_2", "time_embedding.2"),
    ("condition_embedder.text_embedder.linear_1", "text_embedding.0"),
    ("condition_embedder.text_embedder.linear_2", "text_embedding.2"),
    ("condition_embedder.time_proj", "time_projection.1"),
    (r"^scale_shift_table", "head.modulation"),
    (r"^proj_out", "head.head"),
    ("scale_shift_table", "modulation"),
    (r"\.proj_in\.", ".before_proj."),
    (r"\.proj_out\.", ".after_proj."),
    (r"attn1\.", "self_attn."),
    (r"attn2\.", "cross_attn."),
    (r"\.to_out\.0\.", ".o."),
    (r"\.to_([qkv])\.", r".\1."),
    (r"\.add_([kv])_proj\.", r".\1_img."),
    (r"\.norm_added_k\.", ".norm_k_img."),
    (r"ffn\.net\.0\.proj", "ffn.0"),
    (r"ffn\.net\.2", "ffn.2"),
    # The affine norm before the cross attention.
    (r"(blocks\.\d+\.)norm2\.", r"\1norm3."),
)
VAE_NAMES = (
    (r"mid_block\.resnets\.0", "middle.0"),
    (r"mid_block\.resnets\.1", "middle.2"),
    (r"mid_block\.attentions\.0", "middle.1"),
    # Wan2.2 nests its blocks; Wan2.1 counts all of them through.
    (r"down_blocks\.(\d+)\.resnets\.", r"downsamples.\1.downsamples."),
    (r"down_blocks\.(\d+)\.downsampler\.", r"downsamples.\1.downsamples.2."),
    (r"up_blocks\.(\d+)\.upsampler\.", r"upsamples.\1.upsamples.3."),
    (r"down_blocks\.(\d+)\.", r"downsamples.\1."),
    (r"\.norm1\.gamma", ".residual.0.gamma"),
    (r"\.conv1\.(weight|bias)$", r".residual.2.\1"),
    (r"\.norm2\.", ".residual.3."),
    (r"\.conv2\.(weight|bias)$", r".residual.6.\1"),
    (r"\.conv_shortcut\.", ".shortcut."),
    (r"^quant_conv", "conv1"),
    (r"^post_quant_conv", "conv2"),
    (r"(en|de)coder\.conv_in", r"\1coder.conv1"),
    (r"(en|de)coder\.norm_out", r"\1coder.head.0"),
    (r"(en|de)coder\.conv_out", r"\1coder.head.2"),
)
TEXT_NAMES = (
    (r"^shared", "token_embedding"),
    (r"^encoder\.final_layer_norm", "norm"),
    (r"^encoder\.block\.", "blocks."),
    (r"layer\.0\.layer_norm", "norm1"),
    (r"layer\.0\.SelfAttention\.relative_attention_bias", "pos_embedding.embedding"),
    (r"layer\.0\.SelfAttention\.", "attn."),
    (r"layer\.1\.layer_norm", "norm2"),
    (r"layer\.1\.DenseReluDense\.wi_0", "ffn.gate.0"),
    (r"layer\.1\.DenseReluDense\.wi_1", "ffn.fc1"),
    (r"layer\.1\.DenseReluDense\.wo", "ffn.fc2"),
)
VISION_NAMES = (
    (r"embeddings\.class_embedding", "cls_embedding"),
    (r"embeddings\.position_embedding\.weight", "pos_embedding"),
    (r"embeddings\.patch_embedding", "patch_embedding"),
    (r"pre_layrnorm", "pre_norm"),
    (r"post_layernorm", "post_norm"),
    (r"encoder\.layers\.", "transformer."),
    (r"layer_norm([12])", r"norm\1"),
    (r"self_attn\.out_proj", "attn.proj"),
    (r"mlp\.fc1", "mlp.0"),
    (r"mlp\.fc2", "mlp.2"),
    (r"^", "visual."),
)
Names = tuple[tuple[str, str], ...]


def renamed(tensors: Tensors, names: Names) -> Tensors:
    """Tensors under other names: every pattern is replaced in turn."""
    result: Tensors = {}
    for name, tensor in tensors.items():
        for pattern, other in names:
            name = re.sub(pattern, other, name)
        result[name] = tensor.clone()
    return result


def count_through(name: str, wide: bool) -> str:
    """Wan2.1's decoder counts all its blocks through: three residual ones and an upsampler."""
    if wide:
        return re.sub(r"up_blocks\.(\d+)\.resnets\.", r"upsamples.\1.upsamples.", name)
    match = re.match(r"decoder\.up_blocks\.(\d+)\.(resnets|upsamplers)\.(\d+)\.(.*)", name)
    if match is None:
        # Its encoder counts through in diffusers as well.
        return name
    index = int(match[1]) * 4 + (int(match[3]) if match[2] == "resnets" else 3)
    return f"decoder.upsamples.{index}.{match[4]}"


def original_vision(tensors: Tensors) -> Tensors:
    """With fused attention and the towers that Wan does not use."""
    fused = renamed(tensors, VISION_NAMES)
    for layer in range(3):
        for kind in ("weight", "bias"):
            start = f"visual.transformer.{layer}."
            parts = [fused.pop(f"{start}self_attn.{letter}_proj.{kind}") for letter in "qkv"]
            fused[f"{start}attn.to_qkv.{kind}"] = torch.cat(parts)
    fused["visual.cls_embedding"] = fused["visual.cls_embedding"].view(1, 1, -1)
    fused["visual.pos_embedding"] = fused["visual.pos_embedding"].unsqueeze(0)
    fused["visual.head"] = torch.zeros(80, 16)
    fused["textual.model.embeddings.word_embeddings.weight"] = torch.zeros(4, 4)
    return fused | {"log_scale": torch.zeros([])}
