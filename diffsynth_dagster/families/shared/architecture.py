"""Settings that several architectures read from the shapes of their tensors."""

from collections.abc import Iterable

from diffsynth_dagster.families.contract import Settings, Shapes


def count_blocks(names: Iterable[str], prefix: str) -> int:
    """The number of numbered blocks under a prefix such as `transformer_blocks.`"""
    depth = prefix.count(".")
    return len({name.split(".")[depth] for name in names if name.startswith(prefix)})


def joint_transformer_settings(shapes: Shapes, image: str, text: str) -> Settings:
    """The settings that transformers with joint attention over image and text have in common.

    Args:
        image, text: names of the layers that embed the image tokens and the prompt tokens.
    """
    head = shapes["transformer_blocks.0.attn.norm_q.weight"][0]
    inner, in_channels = shapes[f"{image}.weight"]
    # The rotary axes divide a head as published: 1/8 for the first axis, 7/16 for each side.
    side = (head - head // 8) // 2
    return {
        "in_channels": in_channels,
        "num_layers": count_blocks(shapes, "transformer_blocks."),
        "attention_head_dim": head,
        "num_attention_heads": inner // head,
        "joint_attention_dim": shapes[f"{text}.weight"][1],
        "axes_dims_rope": (head // 8, side, side),
    }


def clip_settings(shapes: Shapes, head: int) -> Settings:
    """The settings that CLIP's text and vision towers have in common.

    Args:
        head: channels of an attention head, which does not follow from any shape.
    """
    intermediate, hidden = shapes["encoder.layers.0.mlp.fc1.weight"]
    return {
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": count_blocks(shapes, "encoder.layers."),
        "num_attention_heads": hidden // head,
    }
