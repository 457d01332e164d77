"""The image VAE of the Stable Diffusion models and FLUX.1: from its files to a component."""

from diffusers import AutoencoderKL
from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

from diffsynth_dagster.families.contract import (
    Component,
    ComponentNames,
    Construction,
    Recognition,
    Settings,
    Shapes,
    Tensors,
)
from diffsynth_dagster.families.shared.architecture import count_blocks

_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
"""What diffusers called the layers of the attention before version 0.17 → what it calls them."""


def image_vae(
    scaling_factor: float,
    shift_factor: float = 0.0,
    original_globs: tuple[str, ...] = (),
    checkpoint_prefixes: tuple[str, ...] = ("first_stage_model.",),
) -> Component:
    """The component `vae`, in diffusers' names (old and new) or its authors'.

    Args:
        scaling_factor, shift_factor: of its latents, which no shape shows. A shift of 0 holds even
            where a config.json has none.
        original_globs, checkpoint_prefixes: see `Recognition`.
    """

    def settings(shapes: Shapes) -> Settings:
        scale = {"scaling_factor": scaling_factor, "shift_factor": shift_factor}
        return {**_vae_settings(shapes), **scale}

    return Component(
        name="vae",
        recognition=Recognition(
            signatures=(
                ("encoder.down_blocks.0.resnets.0.conv1.weight", "decoder.conv_norm_out.weight"),
                ("encoder.down.0.block.0.conv1.weight", "decoder.norm_out.weight"),
            ),
            checkpoint_prefixes=checkpoint_prefixes,
            original_globs=original_globs,
        ),
        construction=Construction(
            kind=AutoencoderKL,
            settings=settings,
            fixed={} if shift_factor else {"shift_factor": 0.0},
            convert=convert_vae,
        ),
        names=ComponentNames(folder="vae"),
    )


def latent_channels(shapes: Shapes) -> int:
    """Channels of the latents of a VAE."""
    return shapes["decoder.conv_in.weight"][1]


def _vae_settings(shapes: Shapes) -> Settings:
    """Everything but the scale and shift of the latents."""
    levels = count_blocks(shapes, "encoder.down_blocks.")
    return {
        "in_channels": shapes["encoder.conv_in.weight"][1],
        "out_channels": shapes["decoder.conv_out.weight"][0],
        "down_block_types": ("DownEncoderBlock2D",) * levels,
        "up_block_types": ("UpDecoderBlock2D",) * levels,
        "block_out_channels": tuple(
            shapes[f"encoder.down_blocks.{i}.resnets.0.conv1.weight"][0] for i in range(levels)
        ),
        "layers_per_block": count_blocks(shapes, "encoder.down_blocks.0.resnets."),
        "latent_channels": latent_channels(shapes),
        "use_quant_conv": "quant_conv.weight" in shapes,
        "use_post_quant_conv": "post_quant_conv.weight" in shapes,
    }


def convert_vae(tensors: Tensors) -> Tensors:
    """The authors' names, or diffusers' old ones → diffusers' names."""
    if "encoder.down.0.block.0.conv1.weight" in tensors:
        blocks = range(count_blocks(tensors, "encoder.down."))
        config = {"down_block_types": blocks, "up_block_types": blocks}
        return convert_ldm_vae_checkpoint(tensors, config)
    renamed: Tensors = {}
    for name, tensor in tensors.items():
        layer, _, kind = name.rpartition(".")
        start, _, last = layer.rpartition(".")
        renamed[f"{start}.{_ATTENTION[last]}.{kind}" if last in _ATTENTION else name] = tensor
    return renamed
