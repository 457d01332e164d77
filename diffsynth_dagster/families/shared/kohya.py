"""Layer names in LoRAs of the Stable Diffusion models: kohya's and the authors', to and from ours
(diffusers').

kohya's scripts write layer names with `_` instead of `.`, after a prefix for each component. The
layer names are diffusers' for Stable Diffusion 1, and the authors' for the UNet of SDXL.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from diffsynth_dagster.families.lora import Lora
from diffsynth_dagster.families.sampling_types import Tensors
from diffsynth_dagster.families.shared.names import with_new_start

Rename = Callable[[str], str]

_WITH_UNDERSCORE = (
    *("down_blocks", "mid_block", "up_blocks", "input_blocks", "middle_block", "output_blocks"),
    *("transformer_blocks", "to_q", "to_k", "to_v", "to_out", "proj_in", "proj_out"),
    *("conv_in", "conv_out", "conv_shortcut", "time_emb_proj", "time_embedding", "add_embedding"),
    *("linear_1", "linear_2", "in_layers", "out_layers", "emb_layers", "skip_connection"),
    *("time_embed", "label_emb", "text_model", "self_attn", "q_proj", "k_proj", "v_proj"),
    *("out_proj", "text_projection"),
)
"""Parts of names that contain a real `_`. Every other `_` in kohya's files stands for a `.`."""
# Layers inside a residual block: the authors' names → diffusers'.
_RESNET = {
    "in_layers.2": "conv1",
    "out_layers.3": "conv2",
    "emb_layers.1": "time_emb_proj",
    "skip_connection": "conv_shortcut",
}
# Layers outside the numbered levels: the authors' names → diffusers'.
_OUTSIDE = {
    "input_blocks.0.0": "conv_in",
    "out.2": "conv_out",
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "label_emb.0.0": "add_embedding.linear_1",
    "label_emb.0.2": "add_embedding.linear_2",
    "middle_block.0": "mid_block.resnets.0",
    "middle_block.1": "mid_block.attentions.0",
    "middle_block.2": "mid_block.resnets.1",
}


def _prefixes(levels: int = 4, per_level: int = 2) -> dict[str, str]:
    """Prefixes of the UNet's layer names: the authors' → diffusers'.

    Args:
        levels: four is enough for all published UNets; prefixes that a UNet lacks do no harm.
        per_level: blocks of each level of the downward half, as in every published UNet. The upward
            half has one more.
    """
    prefixes = dict(_OUTSIDE)
    # The authors number the blocks of a half consecutively, with the resampling layers in between.
    # `input_blocks.0` is `conv_in`, so the downward blocks start at 1.
    for level in range(levels):
        first = level * (per_level + 1)
        last = first + per_level
        for kind, name in enumerate(("resnets", "attentions")):
            for block in range(per_level):
                theirs = f"input_blocks.{first + block + 1}.{kind}"
                prefixes[theirs] = f"down_blocks.{level}.{name}.{block}"
            for block in range(per_level + 1):
                theirs = f"output_blocks.{first + block}.{kind}"
                prefixes[theirs] = f"up_blocks.{level}.{name}.{block}"
        prefixes[f"input_blocks.{last + 1}.0.op"] = f"down_blocks.{level}.downsamplers.0.conv"
        prefixes[f"output_blocks.{last}.2.conv"] = f"up_blocks.{level}.upsamplers.0.conv"
    return prefixes


_TO_OURS = _prefixes()
_TO_THEIRS = {ours: theirs for theirs, ours in _TO_OURS.items()}


def unet_name(layer: str) -> str:
    """The authors' name of a UNet layer → diffusers' name. Other names stay."""
    layer = with_new_start(layer, _TO_OURS)
    # Elsewhere `conv1` or `in_layers.2` may be parts of other names.
    if ".resnets." in layer:
        for theirs, ours in _RESNET.items():
            layer = layer.replace(theirs, ours)
    return layer


def authors_unet_name(layer: str) -> str:
    """diffusers' name of a UNet layer → the authors' name: the inverse of `unet_name`."""
    if ".resnets." in layer:
        for theirs, ours in _RESNET.items():
            layer = layer.replace(ours, theirs)
    return with_new_start(layer, _TO_THEIRS)


def clip_name(layer: str) -> str:
    """The name of a CLIP layer in published files → its name in transformers."""
    return layer.removeprefix("text_model.")


def published_clip_name(layer: str) -> str:
    """The name of a CLIP layer in transformers → its name in published files."""
    return f"text_model.{layer}"


def same_name(layer: str) -> str:
    """The same name, for layers that are called the same everywhere."""
    return layer


@dataclass(frozen=True)
class RenamedLayers:
    """Layer names that map one to one, given by two functions: see `families.lora.LayerNames`.

    Attributes:
        to_our_name: their name → our name. Our names stay.
        to_their_name: our name → their name.
        starts: prefixes of our names.
    """

    to_our_name: Rename
    to_their_name: Rename
    starts: tuple[str, ...]

    def ours(self, name: str) -> tuple[str, ...]:
        """Our layer for one of their names; empty if the module has no such layer."""
        layer = self.to_our_name(name if "." in name else _dotted(name))
        return (layer,) if layer.startswith(self.starts) else ()

    def theirs(self, layer: str) -> str | None:
        """Their name of one of our layers."""
        return self.to_their_name(layer)

    def to_theirs(self, lora: Lora) -> Lora:
        """Convert a LoRA from our names to theirs."""
        return lora.part({layer: self.to_their_name(layer) for layer in lora.down})

    def to_ours(self, lora: Lora) -> Lora:
        """Convert a LoRA from their names, which `ours` must know, to ours."""
        return lora.part({name: self.ours(name)[0] for name in lora.down})


def _dotted(name: str) -> str:
    """Turn the underscores of a name in kohya's form back into dots."""
    # Replace all of them, then restore those that belong to a word.
    name = name.replace("_", ".")
    for word in _WITH_UNDERSCORE:
        name = name.replace(word.replace("_", "."), word)
    return name


def load_unet(
    pipeline: Any, module: nn.Module, tensors: Tensors, metadata: Mapping[str, object]
) -> None:
    """Load a LoRA into the UNet the way diffusers' Stable Diffusion pipelines do.

    Args:
        pipeline: the pipeline class.
    """
    # With `unet_config` the pipeline can convert the authors' block numbers in kohya's files.
    state, alphas = pipeline.lora_state_dict(dict(tensors), unet_config=module.config)
    more: dict[str, Any] = {"metadata": dict(metadata) or None, "low_cpu_mem_usage": True}
    pipeline.load_lora_into_unet(state, alphas, module, **more)


def load_text_encoder(
    pipeline: Any,
    folder: str,
    module: nn.Module,
    tensors: Tensors,
    metadata: Mapping[str, object],
) -> None:
    """Load a LoRA into a text encoder the way diffusers' Stable Diffusion pipelines do.

    Args:
        pipeline: the pipeline class.
        folder: the text encoder's folder in the diffusers layout.
    """
    state, alphas = pipeline.lora_state_dict(dict(tensors))
    more: dict[str, Any] = {"metadata": dict(metadata) or None, "low_cpu_mem_usage": True}
    pipeline.load_lora_into_text_encoder(state, alphas, module, folder, **more)


_IN_UNET = (
    *("down_blocks.", "mid_block.", "up_blocks.", "conv_in", "conv_out"),
    *("time_embedding.", "add_embedding."),
)
_IN_CLIP = ("encoder.layers.",)
UNET = RenamedLayers(unet_name, authors_unet_name, _IN_UNET)
"""The authors' layer names of the UNet."""
UNET_OF_DIFFUSERS = RenamedLayers(unet_name, same_name, _IN_UNET)
"""The UNet's layer names in kohya's files for Stable Diffusion 1: writes diffusers', reads both."""
CLIP = RenamedLayers(clip_name, published_clip_name, _IN_CLIP)
"""The layer names of a text tower whose module has no projection."""
PROJECTED_CLIP = RenamedLayers(
    same_name, same_name, ("text_model.encoder.layers.", "text_projection")
)
"""The layer names of a text tower with its projection, which are the same everywhere."""
