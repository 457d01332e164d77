"""The components of Stable Diffusion's UNet and of its ControlNets."""

from diffusers import ControlNetModel, UNet2DConditionModel
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

from diffsynth_dagster.families.contract import (
    Component,
    ComponentNames,
    Construction,
    Recognition,
    Settings,
    Shapes,
    Tensors,
)
from diffsynth_dagster.families.lora import LoraRules
from diffsynth_dagster.families.requirements import Refusal, models_differ, refused_model
from diffsynth_dagster.families.shared.architecture import count_blocks
from diffsynth_dagster.families.shared.image_vae import latent_channels

LORA_TARGETS = ("to_q", "to_k", "to_v", "to_out.0")
"""The attention layers."""
_CHECKPOINT_PREFIX = "model.diffusion_model."
_SIZE_CHANNELS = 256
"""Channels of the embedding of each of SDXL's size facts. No shape shows them."""


def unet(*marks: tuple[str, str], lora: LoraRules) -> Component:
    """The component `unet`. Reads diffusers' names or the authors'.

    Args:
        marks: tensors that other UNets do not have, each as (diffusers' name, the authors' name).
        lora: see `ComponentNames`.
    """
    ours, theirs = zip(*marks, strict=True)
    return Component(
        name="unet",
        recognition=Recognition(
            signatures=(
                ("conv_in.weight", "conv_norm_out.weight", *ours),
                ("input_blocks.0.0.weight", "out.0.weight", *theirs),
            ),
            checkpoint_prefixes=(_CHECKPOINT_PREFIX,),
        ),
        construction=Construction(
            kind=UNet2DConditionModel, settings=_unet_settings, convert=_convert_unet
        ),
        names=ComponentNames(folder="unet", lora=lora),
    )


CONTROLNET = Component(
    name="controlnet",
    recognition=Recognition(
        signatures=(
            ("controlnet_cond_embedding.conv_in.weight", "controlnet_down_blocks.0.weight"),
        )
    ),
    construction=Construction(
        kind=ControlNetModel,
        settings=lambda shapes: {
            **_down_settings(shapes),
            "conditioning_channels": shapes["controlnet_cond_embedding.conv_in.weight"][1],
            "conditioning_embedding_out_channels": (
                shapes["controlnet_cond_embedding.conv_in.weight"][0],
                *(
                    shapes[f"controlnet_cond_embedding.blocks.{i}.weight"][0]
                    # Blocks come in pairs. The second of each sets the next width.
                    for i in range(1, count_blocks(shapes, "controlnet_cond_embedding.blocks."), 2)
                ),
            ),
        },
        blocks=("BasicTransformerBlock",),  # diffusers declares them for the UNet only
    ),
    names=ComponentNames(folder="controlnet", prefix="pipe.controlnet.models.0."),
)


def _down_settings(shapes: Shapes) -> Settings:
    """The settings that UNet and ControlNet have in common: downward half and middle block."""
    levels = range(count_blocks(shapes, "down_blocks."))
    widths = [shapes[f"down_blocks.{i}.resnets.0.conv1.weight"][0] for i in levels]
    attends = [count_blocks(shapes, f"down_blocks.{i}.attentions.") > 0 for i in levels]
    depths = [
        count_blocks(shapes, f"down_blocks.{i}.attentions.0.transformer_blocks.") or 1
        for i in levels[:-1]
    ]
    # diffusers has one setting for the depth of the last level and of the middle block. The middle
    # block shows it even if the last level has no attention. Small models have no middle block.
    middle = count_blocks(shapes, "mid_block.attentions.0.transformer_blocks.")
    # SDXL has linear layers around its attention, and heads of 64 channels. Stable Diffusion 1 has
    # convolutions, and 8 heads. diffusers' `attention_head_dim` is the number of heads.
    proj_in = next((s for n, s in shapes.items() if n.endswith(".attentions.0.proj_in.weight")), ())
    linear = len(proj_in) == 2
    sizes = shapes.get("add_embedding.linear_1.weight")
    return {
        "in_channels": shapes["conv_in.weight"][1],
        "block_out_channels": tuple(widths),
        "down_block_types": tuple("CrossAttn" * a + "DownBlock2D" for a in attends),
        "layers_per_block": count_blocks(shapes, "down_blocks.0.resnets."),
        "mid_block_type": "UNetMidBlock2DCrossAttn" if middle else None,
        "transformer_layers_per_block": (*depths, middle or 1),
        "cross_attention_dim": cross_attention(shapes),
        "attention_head_dim": tuple(w // 64 for w in widths) if linear else 8,
        "use_linear_projection": linear,
        "addition_embed_type": "text_time" if sizes else None,
        "addition_time_embed_dim": _SIZE_CHANNELS if sizes else None,
        "projection_class_embeddings_input_dim": sizes[1] if sizes else None,
    }


def _unet_settings(shapes: Shapes) -> Settings:
    """The settings of the UNet."""
    down = _down_settings(shapes)
    attends = [
        count_blocks(shapes, f"up_blocks.{i}.attentions.") > 0
        for i in range(count_blocks(shapes, "up_blocks."))
    ]
    return {
        **down,
        "out_channels": shapes["conv_out.weight"][0],
        "up_block_types": tuple("CrossAttn" * a + "UpBlock2D" for a in attends),
    }


def _convert_unet(tensors: Tensors) -> Tensors:
    """Rename the authors' tensors to diffusers' names."""
    if "input_blocks.0.0.weight" not in tensors:
        return tensors
    downsamplers = [name for name in tensors if name.endswith(".0.op.weight")]
    config = {
        # `input_blocks` has `conv_in`, then the blocks of each level, with a downsampler between
        # levels. So there is one module more per level than blocks.
        "layers_per_block": count_blocks(tensors, "input_blocks.") // (len(downsamplers) + 1) - 1,
        "addition_embed_type": "text_time" if "label_emb.0.0.weight" in tensors else None,
    }
    # The converter expects the names of a whole checkpoint.
    named = {_CHECKPOINT_PREFIX + name: tensor for name, tensor in tensors.items()}
    converted = convert_ldm_unet_checkpoint(named, config)
    # It returns None for the bias of a layer that has none.
    return {name: tensor for name, tensor in converted.items() if tensor is not None}


def cross_attention(shapes: Shapes) -> int:
    """The width of the prompt embeddings that a UNet or ControlNet reads; 0 if it reads none."""
    return next((s[1] for name, s in shapes.items() if name.endswith(".attn2.to_k.weight")), 0)


SAME_LATENTS = models_differ(
    ("unet", lambda shapes: shapes["conv_out.weight"][0]),
    ("vae", latent_channels),
    "latents of as many channels",
)


def refuse_inpainting(name: str) -> Refusal:
    """Refuse UNets that read a mask or an image in addition to the noisy latents.

    Args:
        name: name of the trained model, for the message.
    """
    return refused_model(
        "unet",
        lambda s: s["conv_in.weight"][1] != s["conv_out.weight"][0],
        "the UNet reads more than the noisy latents (an inpainting or editing checkpoint), which "
        "is not supported",
        f"give one of {name} for text to image",
    )
