"""The settings of Wan's published modules follow from the shapes of their tensors."""

from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel, WanVACETransformer3DModel
from families.wanvideo.cases import WIDE_VAE
from transformers import CLIPVisionConfig, CLIPVisionModel, UMT5Config, UMT5EncoderModel

from diffsynth_dagster.families.wanvideo.family import FAMILY
from diffsynth_dagster.weights.load import build


def clip(**options: Any) -> torch.nn.Module:
    return CLIPVisionModel(CLIPVisionConfig(**options))


def umt5(**options: Any) -> torch.nn.Module:
    return UMT5EncoderModel(UMT5Config(**options))


WAN_14B = {"num_attention_heads": 40, "ffn_dim": 13824, "num_layers": 40}
WAN_1_3B = {"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30}
PUBLISHED = {
    "t2v_14b": ("dit", WanTransformer3DModel, WAN_14B),
    "t2v_1.3b": ("dit", WanTransformer3DModel, WAN_1_3B),
    "i2v_14b": (
        "dit",
        WanTransformer3DModel,
        WAN_14B | {"in_channels": 36, "image_dim": 1280, "added_kv_proj_dim": 5120},
    ),
    "flf2v_14b": (
        "dit",
        WanTransformer3DModel,
        WAN_14B
        | {
            "in_channels": 36,
            "image_dim": 1280,
            "added_kv_proj_dim": 5120,
            "pos_embed_seq_len": 514,
        },
    ),
    "ti2v_5b": (
        "dit",
        WanTransformer3DModel,
        {
            "num_attention_heads": 24,
            "ffn_dim": 14336,
            "num_layers": 30,
            "in_channels": 48,
            "out_channels": 48,
        },
    ),
    "vace_1.3b": (
        "dit",
        WanVACETransformer3DModel,
        WAN_1_3B | {"vace_layers": list(range(0, 30, 2))},
    ),
    "vace_14b": (
        "dit",
        WanVACETransformer3DModel,
        WAN_14B | {"vace_layers": list(range(0, 40, 5))},
    ),
    "vae": ("vae", AutoencoderKLWan, {"decoder_base_dim": 96}),
    "vae_wide": (
        "vae",
        AutoencoderKLWan,
        WIDE_VAE | {"base_dim": 160, "decoder_base_dim": 256},
    ),
    "clip": (
        "image_encoder",
        clip,
        {
            "hidden_size": 1280,
            "intermediate_size": 5120,
            "num_hidden_layers": 32,
            "num_attention_heads": 16,
            "patch_size": 14,
            "hidden_act": "gelu",
        },
    ),
    "umt5": (
        "text_encoder",
        umt5,
        {
            "vocab_size": 256384,
            "d_model": 4096,
            "d_kv": 64,
            "d_ff": 10240,
            "num_layers": 24,
            "num_heads": 64,
        },
    ),
}
"""The published configurations, as far as they differ from the defaults of the libraries."""


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_architectures_follow_from_shapes(name: str) -> None:
    component, make, options = PUBLISHED[name]
    with torch.device("meta"):
        module: Any = make(**options)
        shapes = {n: tuple(t.shape) for n, t in module.state_dict().items()}
        built: Any = build(FAMILY.component(component), shapes, None)
    wanted, got = (
        m.config.to_dict() if name in ("clip", "umt5") else dict(m.config) for m in (module, built)
    )
    # Diffusers' notes, which start with an underscore, say what was left to the defaults.
    assert {k: v for k, v in got.items() if k[0] != "_" and wanted.get(k) != v} == {}
    assert {n: tuple(t.shape) for n, t in built.state_dict().items()} == shapes


def test_latents_of_unknown_scale_are_refused() -> None:
    shapes = {"encoder.conv_in.weight": (8, 3, 3, 3, 3), "post_quant_conv.weight": (4, 4, 1, 1, 1)}
    with pytest.raises(ValueError, match="latents of 4 channels"):
        build(FAMILY.component("vae"), shapes, None)
