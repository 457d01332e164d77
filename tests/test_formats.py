"""LoRA formats: each family in each format, there and back and in the loaders of the tools, and the
spellings of further tools."""

import re
from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from conftest import make_config
from diffusers import (
    FluxTransformer2DModel,
    LTX2VideoTransformer3DModel,
    QwenImageTransformer2DModel,
    UNet2DConditionModel,
    WanTransformer3DModel,
)
from families.flux.cases import ARCHITECTURE as FLUX
from families.ltx2.cases import TRANSFORMER as LTX2
from families.stable_diffusion.cases import ARCHITECTURE as SD
from families.stable_diffusion.cases import UP as SD_UP
from families.stable_diffusion_xl.cases import ARCHITECTURE as SDXL
from families.stable_diffusion_xl.cases import UP as SDXL_UP
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from diffsynth_dagster.families import find_family
from diffsynth_dagster.families.contract import Tensors
from diffsynth_dagster.families.lora import Lora
from diffsynth_dagster.formats import FORMATS, LoraFormat, NamedTensors, find_format
from diffsynth_dagster.formats.change import change_norms, difference
from diffsynth_dagster.formats.contract import UnreadableLora
from diffsynth_dagster.formats.reading import read_all
from diffsynth_dagster.training.lora_targets import lora_targets

QWEN: dict[str, Any] = {
    "num_layers": 2,
    "num_attention_heads": 2,
    "attention_head_dim": 32,
    "in_channels": 64,
    "out_channels": 16,
    "joint_attention_dim": 64,
    "axes_dims_rope": (4, 14, 14),
}
WAN: dict[str, Any] = {
    "num_layers": 2,
    "num_attention_heads": 1,
    "attention_head_dim": 128,
    "ffn_dim": 64,
    "text_dim": 32,
    "added_kv_proj_dim": 128,
    "image_dim": 16,
}
TEXT: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 1,
    "projection_dim": 64,
}
MODULES: dict[tuple[str, str], Callable[[], nn.Module]] = {
    ("qwen_image", "dit"): lambda: QwenImageTransformer2DModel(**QWEN),
    ("flux", "dit"): lambda: FluxTransformer2DModel(**FLUX, num_layers=2, num_single_layers=2),
    ("flux", "text_encoder"): lambda: CLIPTextModel(CLIPTextConfig(**TEXT)),
    ("wanvideo", "dit"): lambda: WanTransformer3DModel(**WAN),
    ("ltx2", "dit"): lambda: LTX2VideoTransformer3DModel(**LTX2),
    ("stable_diffusion", "unet"): lambda: UNet2DConditionModel(**SD, up_block_types=SD_UP),
    ("stable_diffusion", "text_encoder"): lambda: CLIPTextModel(CLIPTextConfig(**TEXT)),
    ("stable_diffusion_xl", "unet"): lambda: UNet2DConditionModel(**SDXL, up_block_types=SDXL_UP),
    ("stable_diffusion_xl", "text_encoder"): lambda: CLIPTextModel(CLIPTextConfig(**TEXT)),
    ("stable_diffusion_xl", "text_encoder_2"): lambda: CLIPTextModelWithProjection(
        CLIPTextConfig(**TEXT)
    ),
}
PLACES = list(MODULES)
KINDS = ("alpha = rank", "alpha = rank / 3", "mixed ranks")
ROUNDING = 1e-6


def empty(place: tuple[str, str]) -> nn.Module:
    with torch.device("meta"):
        return MODULES[place]()


def some_lora(place: tuple[str, str], kind: str = KINDS[0]) -> Lora:
    """A random LoRA of the usual layers of a component."""
    family, name = place
    module = empty(place)
    base = {"dataset_base_path": "d", "dataset_metadata_path": "m.csv", "model_paths": ["x"]}
    config = make_config({**base, "lora_base_model": name})
    source = torch.Generator().manual_seed(0)
    down: Tensors = {}
    up: Tensors = {}
    scale: dict[str, float] = {}
    for number, layer in enumerate(lora_targets(config, find_family(family), module, name)):
        weight: Any = module.get_submodule(layer).weight
        rank = 2 + number % 3 if kind == "mixed ranks" else 4
        scale[layer] = 1.0 if kind == KINDS[0] else 1 / 3
        down[layer] = torch.randn(rank, *weight.shape[1:], generator=source)
        up[layer] = torch.randn(len(weight), rank, generator=source)
    lora = Lora(down, up, scale)
    assert len(lora.down) >= 8
    return lora


QUICKLY = [
    # Its layers are those of Stable Diffusion 1.5, but more.
    pytest.param(p, marks=pytest.mark.soak) if p == ("stable_diffusion_xl", "unet") else p
    for p in PLACES
]


@pytest.mark.parametrize("place", QUICKLY, ids="-".join)
def test_every_format_there_and_back_and_in_its_tool(
    place: tuple[str, str], show: Callable[[str], None]
) -> None:
    """No key is left out, and the change of each layer is that of the training."""
    family, name = place
    rules = {name: find_family(family).lora_rules(name)}
    lines: list[str] = []
    for kind, format_name in product(KINDS, FORMATS):
        lora = some_lora(place, kind)
        written = find_format(format_name).write({name: lora}, rules)
        back = find_format(format_name).read(written.tensors, rules)[name]
        there = difference(lora, back)
        loaded = find_format(format_name).try_load(written, name, empty(place), rules)
        applied = difference(lora, loaded)
        lines.append(f"{family:20} {name:15} {format_name:10} {kind:17} {there:.1e} {applied:.1e}")
        assert loaded.down.keys() == lora.down.keys()
        assert max(there, applied) <= ROUNDING
    show("\n".join(lines))


DENOISERS = [place for place in PLACES if not place[1].startswith("text_encoder")]
LOADERS: dict[str, LoraFormat] = {
    "diffusers": "diffusers",
    "ComfyUI": "comfyui",
    "DiffSynth-Studio": "guide",
}
NOT_READ = {("stable_diffusion", "ComfyUI"), ("stable_diffusion", "diffusers")}
"""Checkpoints of Stable Diffusion 1.5 have the names that DiffSynth-Studio reads, and no other tool; its
exports are for the others."""


@pytest.mark.parametrize("place", DENOISERS, ids="-".join)
def test_a_checkpoint_loads_in_every_tool(
    place: tuple[str, str], show: Callable[[str], None]
) -> None:
    """As the command line writes it, with another alpha than the rank."""
    family, name = place
    rules = {name: find_family(family).lora_rules(name)}
    lora = some_lora(place, KINDS[1])
    native = rules[name].native
    written = find_format(native).write({name: lora}, rules)
    lines: list[str] = []
    for tool, loader in LOADERS.items():
        try:
            loaded = find_format(loader).try_load(written, name, empty(place), rules)
        except UnreadableLora as error:
            assert (family, tool) in NOT_READ
            lines.append(f"{family:20} {native:10} {tool:17} {error}")
            continue
        assert (family, tool) not in NOT_READ
        lines.append(
            f"{family:20} {native:10} {tool:17} {len(lora.down) - len(loaded.down)} of "
            f"{len(lora.down)} unmatched, change differs by {difference(lora, loaded):.1e}"
        )
        assert loaded.down.keys() == lora.down.keys()
        assert difference(lora, loaded) <= ROUNDING
    show("\n".join(lines))


def layers_in(tensors: Tensors) -> set[str]:
    return {re.sub(r"\.(lora_(A|B|down|up)\S*|alpha)$", "", name) for name in tensors}


@pytest.mark.parametrize(
    ("place", "format_name", "layer", "written"),
    [
        (
            ("wanvideo", "dit"),
            "comfyui",
            "blocks.1.attn2.to_out.0",
            "diffusion_model.blocks.1.cross_attn.o",
        ),
        (("wanvideo", "dit"), "comfyui", "blocks.0.ffn.net.2", "diffusion_model.blocks.0.ffn.2"),
        (("wanvideo", "dit"), "guide", "blocks.0.attn1.to_q", "blocks.0.self_attn.q"),
        (("wanvideo", "dit"), "kohya", "blocks.0.attn1.to_q", "lora_unet_blocks_0_self_attn_q"),
        (
            ("qwen_image", "dit"),
            "comfyui",
            "transformer_blocks.0.img_mlp.net.2",
            "diffusion_model.transformer_blocks.0.img_mlp.net.2",
        ),
        (
            ("qwen_image", "dit"),
            "kohya",
            "transformer_blocks.0.attn.to_q",
            "lora_unet_transformer_blocks_0_attn_to_q",
        ),
        (
            ("flux", "dit"),
            "guide",
            "transformer_blocks.1.attn.to_k",
            "blocks.1.attn.a_to_qkv",
        ),
        (
            ("flux", "dit"),
            "comfyui",
            "single_transformer_blocks.1.proj_mlp",
            "diffusion_model.single_blocks.1.linear1",
        ),
        (
            ("flux", "dit"),
            "diffusers",
            "transformer_blocks.1.norm1.linear",
            "transformer.transformer_blocks.1.norm1.linear",
        ),
        (
            ("stable_diffusion", "unet"),
            "kohya",
            "mid_block.attentions.0.transformer_blocks.0.attn1.to_q",
            "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q",
        ),
        (
            ("stable_diffusion_xl", "unet"),
            "kohya",
            "mid_block.attentions.0.transformer_blocks.0.attn1.to_q",
            "lora_unet_middle_block_1_transformer_blocks_0_attn1_to_q",
        ),
        (
            ("stable_diffusion_xl", "text_encoder"),
            "kohya",
            "encoder.layers.0.self_attn.q_proj",
            "lora_te1_text_model_encoder_layers_0_self_attn_q_proj",
        ),
        (
            ("stable_diffusion_xl", "text_encoder_2"),
            "kohya",
            "text_model.encoder.layers.0.self_attn.q_proj",
            "lora_te2_text_model_encoder_layers_0_self_attn_q_proj",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_names_are_those_that_the_tools_have(
    place: tuple[str, str], format_name: LoraFormat, layer: str, written: str
) -> None:
    """As the tools' sources spell them."""
    family, name = place
    rules = {name: find_family(family).lora_rules(name)}
    lora = Lora({layer: torch.ones(2, 4)}, {layer: torch.ones(12, 2)}, {layer: 0.5})
    spelled = find_format(format_name).write({name: lora}, rules)
    assert layers_in(spelled.tensors) == {written}
    halves = ("lora_down", "lora_up") if format_name == "kohya" else ("lora_A", "lora_B")
    end = ".default.weight" if format_name == "guide" else ".weight"
    wanted = {f"{written}.{half}{end}" for half in halves}
    has_alpha = format_name in ("comfyui", "kohya")
    assert spelled.tensors.keys() == wanted | ({f"{written}.alpha"} if has_alpha else set())


FOREIGN: list[tuple[str, str, str, str]] = [
    ("wanvideo", "base_model.model.blocks.0.attn1.to_q.lora_{A}.weight", "A,B", ""),
    (
        "wanvideo",
        "base_model.model.diffusion_model.blocks.0.self_attn.q.lora_{A}.weight",
        "A,B",
        "",
    ),
    ("wanvideo", "lora_unet__blocks_0_self_attn_q.lora_{A}.weight", "down,up", ""),
    ("wanvideo", "lora_unet_blocks_0_self_attn_q.lora_{A}.weight", "down,up", ""),
    ("wanvideo", "transformer.blocks.0.attn1.to_q.lora_{A}.default_0.weight", "A,B", ""),
    ("wanvideo", "blocks.0.self_attn.q.lora_{A}.default.weight", "A,B", ""),
    ("qwen_image", "lora_unet_transformer_blocks_0_attn_to_q.lora_{A}.weight", "down,up", ""),
    (
        "qwen_image",
        "lora_transformer_transformer_blocks_0_attn_to_q.lora_{A}.weight",
        "down,up",
        "",
    ),
    ("flux", "double_blocks.0.processor.proj_lora1.{A}.weight", "down,up", "attn.to_out.0"),
    ("flux", "double_blocks.0.processor.qkv_lora2.{A}.weight", "down,up", "attn.add_v_proj"),
    ("flux", "single_blocks.0.processor.qkv_lora.{A}.weight", "down,up", "attn.to_q"),
    ("flux", "blocks.0.ff_a.0.lora_{A}.default.weight", "A,B", "ff.net.0.proj"),
    ("flux", "lora_transformer_transformer_blocks_0_attn_to_q.lora_{A}.weight", "down,up", ""),
    (
        "stable_diffusion",
        "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.processor.to_out_lora.{A}.weight",
        "down,up",
        "attn1.to_out.0",
    ),
    (
        "stable_diffusion",
        "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.lora.{A}.weight",
        "down,up",
        "attn1.to_q",
    ),
]


@pytest.mark.parametrize(("family", "key", "halves", "layer"), FOREIGN)
def test_spellings_of_further_tools_are_read(
    family: str, key: str, halves: str, layer: str
) -> None:
    name = "unet" if family == "stable_diffusion" else "dit"
    first, second = halves.split(",")
    tensors = {key.format(A=first): torch.ones(2, 4), key.format(A=second): torch.ones(12, 2)}
    rules = {name: find_family(family).lora_rules(name)}
    found = read_all(tensors, rules)[name]
    assert found.unknown is None
    assert any(own.endswith(layer or "to_q") for own in found.lora.down)
    assert set(found.lora.scale.values()) == {1.0}


HALVES = {
    "diffusion_model.blocks.0.self_attn.q.lora_A.weight": torch.ones(2, 4),
    "diffusion_model.blocks.0.self_attn.q.lora_B.weight": torch.ones(4, 2),
}


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"diffusion_model.blocks.0.norm3.w_norm": torch.ones(4)}, r"norm3\.w_norm"),
        ({"diffusion_model.blocks.0.ffn.0.oft_blocks": torch.ones(4)}, r"ffn\.0\.oft_blocks"),
        ({"diffusion_model.blocks.0.ffn.0.diff_m": torch.ones(4)}, r"ffn\.0\.diff_m"),
        ({"lora_unet_blocks_0_ffn_0.a1.weight": torch.ones(4, 4)}, r"ffn_0\.a1\.weight"),
        (
            {"diffusion_model.blocks.0.self_attn.q.lora_up.bias": torch.ones(4)},
            r"self_attn\.q\.lora_up\.bias",
        ),
        (
            {
                "transformer.blocks.1.attn1.to_q.lora_A.weight": torch.ones(2, 4),
                "transformer.blocks.1.attn1.to_q.lora_B.weight": torch.ones(4, 2),
            },
            r"two ways, 'diffusion_model\.' .* and 'transformer\.' \(transformer\.blocks\.1",
        ),
        (
            {"diffusion_model.blocks.1.self_attn.q.lora_A.weight": torch.ones(2, 4)},
            r"half of a LoRA.*blocks\.1\.self_attn\.q\.lora_A",
        ),
        (
            {
                "diffusion_model.blocks.1.self_attn.q.lora_A.weight": torch.ones(2, 4),
                "diffusion_model.blocks.1.self_attn.q.lora_B.weight": torch.ones(4, 3),
            },
            r"two ranks: diffusion_model\.blocks\.1",
        ),
        (
            {
                "diffusion_model.blocks.0.attn1.to_q.lora_A.weight": torch.ones(2, 4),
                "diffusion_model.blocks.0.attn1.to_q.lora_B.weight": torch.ones(4, 2),
            },
            "'blocks.0.attn1.to_q' is there twice",
        ),
    ],
)
def test_what_is_half_understood_is_refused_with_its_key(more: Tensors, words: str) -> None:
    rules = {"dit": find_family("wanvideo").lora_rules("dit")}
    assert list(read_all(HALVES, rules)) == ["dit"]
    with pytest.raises(UnreadableLora, match=words):
        read_all({**HALVES, **more}, rules)


def test_a_tool_that_leaves_keys_out_is_noticed() -> None:
    place = ("wanvideo", "dit")
    rules = {"dit": find_family("wanvideo").lora_rules("dit")}
    lora = some_lora(place)
    in_diffusers = find_format("diffusers").write({"dit": lora}, rules)
    for tool in ("comfyui", "guide"):
        with pytest.raises(UnreadableLora, match="transformer"):
            find_format(tool).try_load(in_diffusers, "dit", empty(place), rules)
    less = dict(in_diffusers.tensors)
    less["transformer.blocks.9.attn1.to_q.lora_A.weight"] = torch.ones(4, 128)
    less["transformer.blocks.9.attn1.to_q.lora_B.weight"] = torch.ones(128, 4)
    with pytest.raises(UnreadableLora):
        find_format("diffusers").try_load(NamedTensors(less), "dit", empty(place), rules)


def test_norms_of_a_change_are_those_of_the_product() -> None:
    lora = some_lora(("qwen_image", "dit"), KINDS[2])
    norms = change_norms(lora)
    for layer, a in lora.down.items():
        product_of = lora.scale[layer] * lora.up[layer].double() @ a.double()
        assert norms[layer] == pytest.approx(float(product_of.norm()), rel=1e-9)
    changed = Lora(lora.down, {n: b * 1.25 for n, b in lora.up.items()}, lora.scale)
    assert difference(lora, changed) == pytest.approx(0.2, rel=1e-6)
    fewer = lora.part({layer: layer for layer in [*lora.down][1:]})
    assert difference(lora, fewer) == 1.0
    assert difference(lora, lora) < 1e-7
