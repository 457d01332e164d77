"""The component of the image VAE of the Stable Diffusion models and FLUX.1."""

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
"""diffusers' names of the attention layers before version 0.17 → today's names."""


def image_vae(
    scaling_factor: float,
    shift_factor: float = 0.0,
    original_globs: tuple[str, ...] = (),
    checkpoint_prefixes: tuple[str, ...] = ("first_stage_model.",),
) -> Component:
    """The component `vae`. Reads diffusers' names (old and new) or the authors'.

    Args:
        scaling_factor, shift_factor: scale and shift of the latents, which no shape shows.
        original_globs, checkpoint_prefixes: see `Recognition`.
    """

    def settings(shapes: Shapes) -> Settings:
        """The settings for files without a config.json."""
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
            # Without a shift, config.json leaves it out or has None, but we need a number.
            fixed={} if shift_factor else {"shift_factor": 0.0},
            convert=convert_vae,
        ),
        names=ComponentNames(folder="vae"),
    )


def latent_channels(shapes: Shapes) -> int:
    """The number of latent channels of a VAE."""
    return shapes["decoder.conv_in.weight"][1]


def _vae_settings(shapes: Shapes) -> Settings:
    """All settings except the scale and shift of the latents."""
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
    """Rename the authors' tensors, or tensors with diffusers' old names, to diffusers' names."""
    if "encoder.down.0.block.0.conv1.weight" in tensors:
        # The converter only asks how many blocks there are.
        blocks = range(count_blocks(tensors, "encoder.down."))
        config = {"down_block_types": blocks, "up_block_types": blocks}
        return convert_ldm_vae_checkpoint(tensors, config)
    renamed: Tensors = {}
    for name, tensor in tensors.items():
        layer, _, kind = name.rpartition(".")
        parent, _, last = layer.rpartition(".")
        renamed[f"{parent}.{_ATTENTION[last]}.{kind}" if last in _ATTENTION else name] = tensor
    return renamed
