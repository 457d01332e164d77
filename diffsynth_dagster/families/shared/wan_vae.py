"""The components of the causal video VAEs of Wan 2.1 and 2.2, and of Qwen-Image's VAE, which was
made from the former."""

from diffusers import AutoencoderKLQwenImage, AutoencoderKLWan
from diffusers.loaders import single_file_utils

from diffsynth_dagster.families.contract import (
    Component,
    ComponentNames,
    Construction,
    Recognition,
    Settings,
    Shapes,
    Tensors,
)
from diffsynth_dagster.families.shared.names import with_new_starts

FOLD = 2
"""Sides of the patches of pixels that Wan2.2's VAE folds into channels before it encodes."""
WIDE_LATENTS = 48
"""Latent channels of Wan2.2's VAE, which compresses 16x16 pixels and 4 frames to a latent."""


def _numbers(text: str) -> list[float]:
    """Parse numbers separated by white space."""
    return [float(number) for number in text.split()]


# Wan2.2_VAE.pth does not contain these. Copied from vae/config.json of
# Wan-AI/Wan2.2-TI2V-5B-Diffusers.
WIDE_MEAN = _numbers("""
    -0.2289 -0.0052 -0.1323 -0.2339 -0.2799  0.0174  0.1838  0.1557 -0.1382  0.0542  0.2813  0.0891
     0.1570 -0.0098  0.0375 -0.1825 -0.2246 -0.1207 -0.0698  0.5109  0.2665 -0.2108 -0.2158  0.2502
    -0.2055 -0.0322  0.1109  0.1567 -0.0729  0.0899 -0.2799 -0.1230 -0.0313 -0.1649  0.0117  0.0723
    -0.2839 -0.2083 -0.0520  0.3748  0.0152  0.1957  0.1433 -0.2944  0.3573 -0.0548 -0.1681 -0.0667
""")
WIDE_STD = _numbers("""
    0.4765 1.0364 0.4514 1.1677 0.5313 0.4990 0.4818 0.5013 0.8158 1.0344 0.5894 1.0901
    0.6885 0.6165 0.8454 0.4978 0.5759 0.3523 0.7135 0.6804 0.5833 1.4146 0.8986 0.5659
    0.7069 0.5338 0.4889 0.4917 0.4069 0.4999 0.6866 0.4093 0.5709 0.6065 0.6415 0.4944
    0.5726 1.2042 0.5458 1.6887 0.3971 1.0600 0.3943 0.5537 0.5444 0.4089 0.7468 0.7744
""")

_RESNET = {
    "residual.0.": "norm1.",
    "residual.2.": "conv1.",
    "residual.3.": "norm2.",
    "residual.6.": "conv2.",
    "shortcut.": "conv_shortcut.",
    "": "",
}


def _nested(side: str, way: str) -> dict[str, str]:
    """Prefixes inside the nested blocks of `Wan2.2_VAE.pth` → in diffusers.

    Args:
        side, way: "encoder" and "down", or "decoder" and "up".
    """
    old, new = f"{side}.{way}samples.*.{way}samples.*.", f"{side}.{way}_blocks.*."
    # In the file, residual blocks and the resampler are one numbered list. diffusers keeps the
    # resampler apart, without a number: its new prefix has one `*` less.
    resampler = {f"{old}{n}.": f"{new}{way}sampler.{n}." for n in ("resample", "time_conv")}
    return resampler | {f"{old}{o}": f"{new}resnets.*.{n}" for o, n in _RESNET.items()}


_NESTED = _nested("encoder", "down") | _nested("decoder", "up")


def convert_wan_vae(tensors: Tensors) -> Tensors:
    """Rename the tensors of `Wan2.1_VAE.pth` and `Wan2.2_VAE.pth` to diffusers' names."""
    # diffusers' converter does not know the nested blocks of 2.2.
    return single_file_utils.convert_wan_vae_to_diffusers(with_new_starts(tensors, _NESTED))


def wan_vae_settings(shapes: Shapes) -> Settings:
    """The settings of Wan's VAE. The mean and deviation of the latents are the published ones.

    Raises:
        ValueError: none are published for this number of latent channels.
    """
    base, in_channels = shapes["encoder.conv_in.weight"][:2]
    channels = shapes["post_quant_conv.weight"][0]
    if channels not in (16, WIDE_LATENTS):
        raise ValueError(f"the mean and deviation of latents of {channels} channels are not known")
    settings: Settings = {
        "base_dim": base,
        "decoder_base_dim": shapes["decoder.norm_out.gamma"][0],
        "z_dim": channels,
        "in_channels": in_channels,
        "out_channels": in_channels,
        "is_residual": "encoder.down_blocks.0.resnets.0.conv1.weight" in shapes,
    }
    if channels == WIDE_LATENTS:
        settings |= {"latents_mean": WIDE_MEAN, "latents_std": WIDE_STD}
    if in_channels > 3:  # the channels of folded patches
        settings |= {"patch_size": FOLD, "scale_factor_spatial": 16}
    return settings


def qwen_vae_settings(shapes: Shapes) -> Settings:
    """The settings of Qwen-Image's VAE. The class has the published mean and deviation itself."""
    return {
        "base_dim": shapes["encoder.conv_in.weight"][0],
        "z_dim": shapes["post_quant_conv.weight"][0],
    }


WAN_VAE = Component(
    name="vae",
    recognition=Recognition(
        signatures=(
            ("encoder.mid_block.attentions.0.to_qkv.weight", "post_quant_conv.weight"),
            ("encoder.middle.1.to_qkv.weight", "encoder.conv1.weight", "conv2.weight"),
        ),
        original_globs=("Wan2.?_VAE.pth",),
    ),
    construction=Construction(
        kind=AutoencoderKLWan, settings=wan_vae_settings, convert=convert_wan_vae
    ),
    names=ComponentNames(folder="vae"),
)
QWEN_VAE = Component(
    name="vae",
    recognition=Recognition(
        signatures=(("encoder.conv_in.weight", "decoder.conv_in.weight", "post_quant_conv.weight"),)
    ),
    construction=Construction(kind=AutoencoderKLQwenImage, settings=qwen_vae_settings),
    names=ComponentNames(folder="vae"),
)
