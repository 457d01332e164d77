"""LoRAs of the Stable Diffusion models: in kohya's and the authors' names, and in diffusers'.

kohya's scripts write the names of layers with `_` for `.`, behind a prefix for each component:
those of diffusers for Stable Diffusion 1, those of the authors for the UNet of SDXL.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

from diffsynth_dagster.families.contract import Tensors
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
_OTHERS = ("lora_unet_", "lora_te", "unet.", "text_encoder.", "text_encoder_2.")
"""How layers start that a file of several components has for another one."""

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


def to_kohya(start: str, rename: Rename, tensors: Tensors, alpha: float) -> Tensors:
    """A LoRA by the module's names → in kohya's.

    Args:
        start: the prefix of the component.
        rename: a layer by the module's name → by the name that kohya's scripts know.
        tensors: `<layer>.lora_A.weight`, `<layer>.lora_B.weight`.
    """
    named: Tensors = {}
    for name, tensor in tensors.items():
        layer, half, _ = name.rsplit(".", 2)
        key = start + rename(layer).replace(".", "_")
        named[f"{key}.lora_{'down' if half == 'lora_A' else 'up'}.weight"] = tensor
        named[f"{key}.alpha"] = torch.tensor(alpha)
    return named


def from_authors(starts: tuple[str, ...], rename: Rename, tensors: Tensors) -> Tensors:
    """A LoRA in kohya's names, or the authors', with an alpha for each layer → by the module's.
    Layers of other components, which such files hold too, are left out.

    Args:
        starts: kohya's prefixes of the component.
        rename: a layer by the authors' name → by the module's.
    """
    renamed: Tensors = {}
    for name, tensor in tensors.items():
        ends = (".lora_A.weight", ".lora_B.weight", ".alpha")
        end = next(end for end in ends if name.endswith(end))
        layer = name.removesuffix(end)
        own = next((start for start in starts if layer.startswith(start)), None)
        if own is not None:
            layer = _dotted(layer.removeprefix(own))
        elif layer.startswith(_OTHERS):
            continue
        renamed[rename(layer) + end] = tensor
    return renamed


def _dotted(name: str) -> str:
    """A name in kohya's form → with its dots."""
    name = name.replace("_", ".")
    for word in _WITH_UNDERSCORE:
        name = name.replace(word.replace("_", "."), word)
    return name


def load_lora(
    pipeline: Any,
    component: str,
    module: nn.Module,
    tensors: Tensors,
    metadata: Mapping[str, object],
) -> None:
    """Load an exported LoRA the way the pipelines of Stable Diffusion do.

    Args:
        pipeline: its class.

    Raises:
        ValueError: the pipeline loads no LoRA into this component.
    """
    config: Any = module.config if component == "unet" else None
    state, alphas = pipeline.lora_state_dict(dict(tensors), unet_config=config)
    more: dict[str, Any] = {"metadata": dict(metadata) or None, "low_cpu_mem_usage": True}
    if component == "unet":
        pipeline.load_lora_into_unet(state, alphas, module, **more)
    elif component.startswith("text_encoder"):
        pipeline.load_lora_into_text_encoder(state, alphas, module, component, **more)
    else:
        raise ValueError(f"{pipeline.__name__} loads no LoRA into its {component}")


TO_UNET = partial(from_authors, ("lora_unet_",), unet_name)
"""`Family.from_authors` of the UNet."""
