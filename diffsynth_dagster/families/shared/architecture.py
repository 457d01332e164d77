"""Build the module of a component from its config.json, or from the shapes of its tensors."""

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.initialization import no_init_weights

from diffsynth_dagster.families.contract import Component, Settings, Shapes


def build(component: Component, shapes: Shapes, config: Mapping[str, object] | None) -> nn.Module:
    """The module of a component, of diffusers or transformers, whose weights are not initialised: that
    takes most of the time, and they come from files.

    Args:
        shapes: of the tensors by the module's names.
        config: its config.json; where there is none the settings come from the shapes.

    Raises:
        KeyError, TypeError, ValueError: the settings or shapes make no such module.
    """
    kind: Any = component.kind_of(shapes)
    settings = component.settings(shapes) if config is None else dict(config)
    settings |= component.fixed
    with no_init_weights():
        if issubclass(kind, PreTrainedModel):
            make: Any = kind.config_class
            return kind(make(**settings) if config is None else make.from_dict(settings))
        if config is None:
            return kind(**settings)
        # Names with an underscore are diffusers' notes about the file, not settings.
        return kind.from_config({k: v for k, v in settings.items() if not k.startswith("_")})


def count_blocks(names: Iterable[str], prefix: str) -> int:
    """How many numbered blocks there are under a prefix such as `transformer_blocks.`."""
    depth = prefix.count(".")
    return len({name.split(".")[depth] for name in names if name.startswith(prefix)})


def joint_transformer_settings(shapes: Shapes, image: str, text: str) -> Settings:
    """The settings that transformers with joint attention over image and text have in common.

    The rotary axes take the published shares of a head: 1/8 for the first, 7/16 for each side.

    Args:
        image, text: names of the layers that embed the image's tokens and the prompt's.
    """
    head = shapes["transformer_blocks.0.attn.norm_q.weight"][0]
    inner, in_channels = shapes[f"{image}.weight"]
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
        head: channels of an attention head, which no shape shows.
    """
    intermediate, hidden = shapes["encoder.layers.0.mlp.fc1.weight"]
    return {
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": count_blocks(shapes, "encoder.layers."),
        "num_attention_heads": hidden // head,
    }
