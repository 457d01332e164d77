"""LoRAs of the Stable Diffusion models: in kohya's and the authors' names, and in diffusers'.

kohya's scripts write the names of layers with `_` for `.`, behind a prefix for each component:
those of diffusers for Stable Diffusion 1, those of the authors for the UNet of SDXL.
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
"""Parts of names in which a `_` is not a `.` that kohya's scripts replaced."""
_RESNET = {
    "in_layers.2": "conv1",
    "out_layers.3": "conv2",
    "emb_layers.1": "time_emb_proj",
    "skip_connection": "conv_shortcut",
}
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


def _places(levels: int = 4, per_level: int = 2) -> dict[str, str]:
    """How layers of the UNet start by its authors' names → by diffusers'.

    Args:
        per_level: blocks of each level on the way down, as in every published UNet; on the way up
            there is one more.
    """
    places = dict(_OUTSIDE)
    for level in range(levels):
        first = level * (per_level + 1)
        last = first + per_level
        for kind, name in enumerate(("resnets", "attentions")):
            for block in range(per_level):
                theirs = f"input_blocks.{first + block + 1}.{kind}"
                places[theirs] = f"down_blocks.{level}.{name}.{block}"
            for block in range(per_level + 1):
                theirs = f"output_blocks.{first + block}.{kind}"
                places[theirs] = f"up_blocks.{level}.{name}.{block}"
        places[f"input_blocks.{last + 1}.0.op"] = f"down_blocks.{level}.downsamplers.0.conv"
        places[f"output_blocks.{last}.2.conv"] = f"up_blocks.{level}.upsamplers.0.conv"
    return places


_PLACES = _places()
_BACK = {ours: theirs for theirs, ours in _PLACES.items()}


def unet_name(layer: str) -> str:
    """A layer of the UNet by its authors' name → by diffusers'; other names stay."""
    layer = with_new_start(layer, _PLACES)
    if ".resnets." in layer:
        for theirs, ours in _RESNET.items():
            layer = layer.replace(theirs, ours)
    return layer


def authors_unet_name(layer: str) -> str:
    """The other way round."""
    if ".resnets." in layer:
        for theirs, ours in _RESNET.items():
            layer = layer.replace(ours, theirs)
    return with_new_start(layer, _BACK)


def clip_name(layer: str) -> str:
    """A layer of CLIP's text tower by the name in published files → by that of transformers."""
    return layer.removeprefix("text_model.")


def published_clip_name(layer: str) -> str:
    """The other way round."""
    return f"text_model.{layer}"


def same_name(layer: str) -> str:
    """For layers that have one name everywhere."""
    return layer


@dataclass(frozen=True)
class RenamedLayers:
    """Layers that have one name each elsewhere, by two functions: see `families.lora.LayerNames`.

    Attributes:
        to_our_name: a layer by the name there → by that here; names of here stay.
        to_their_name: the other way round.
        starts: how the names of layers start here.
    """

    to_our_name: Rename
    to_their_name: Rename
    starts: tuple[str, ...]

    def ours(self, name: str) -> tuple[str, ...]:
        """The layer here of a name there; none where it is no layer of such a module."""
        layer = self.to_our_name(name if "." in name else _dotted(name))
        return (layer,) if layer.startswith(self.starts) else ()

    def theirs(self, layer: str) -> str | None:
        """The name there of a layer here."""
        return self.to_their_name(layer)

    def to_theirs(self, lora: Lora) -> Lora:
        """A LoRA by the names here → by those there."""
        return lora.part({layer: self.to_their_name(layer) for layer in lora.down})

    def to_ours(self, lora: Lora) -> Lora:
        """A LoRA by the names there → by those here."""
        return lora.part({name: self.ours(name)[0] for name in lora.down})


def _dotted(name: str) -> str:
    """A name in kohya's form → with its dots."""
    name = name.replace("_", ".")
    for word in _WITH_UNDERSCORE:
        name = name.replace(word.replace("_", "."), word)
    return name


def load_unet(
    pipeline: Any, module: nn.Module, tensors: Tensors, metadata: Mapping[str, object]
) -> None:
    """Load a LoRA into the UNet the way the pipelines of Stable Diffusion do.

    Args:
        pipeline: its class.
    """
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
    """Load a LoRA into a text encoder the way the pipelines of Stable Diffusion do.

    Args:
        pipeline: its class.
        folder: of the text encoder.
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
"""The UNet's layers by its authors' names."""
UNET_OF_DIFFUSERS = RenamedLayers(unet_name, same_name, _IN_UNET)
"""The same by diffusers' names, which kohya's scripts write for Stable Diffusion 1; both are read."""
CLIP = RenamedLayers(clip_name, published_clip_name, _IN_CLIP)
"""The layers of a text tower that has no projection here."""
PROJECTED_CLIP = RenamedLayers(
    same_name, same_name, ("text_model.encoder.layers.", "text_projection")
)
"""Those of one with its projection, which have one name everywhere."""
