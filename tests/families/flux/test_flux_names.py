"""FLUX.1's layers by the names of other tools, against diffusers' own converters."""

import pytest
import torch
from conftest import make_config
from diffusers import FluxPipeline, FluxTransformer2DModel
from diffusers.loaders.single_file_utils import convert_flux_transformer_checkpoint_to_diffusers
from families.flux.cases import ARCHITECTURE

from diffsynth_dagster.families import find_family
from diffsynth_dagster.families.contract import Tensors
from diffsynth_dagster.families.flux.lora import TRANSFORMER
from diffsynth_dagster.families.flux.names import LORA_ALIASES, NAMES, PREFIX
from diffsynth_dagster.formats import find_format
from diffsynth_dagster.formats.kohya import FORMAT as KOHYA
from diffsynth_dagster.formats.names import lora_of, with_dots
from diffsynth_dagster.training.lora_targets import lora_targets

RULES = {"dit": TRANSFORMER}


def published_names(double: int = 2, single: int = 2) -> Tensors:
    """The authors' transformer at its published heights, one number wide."""
    source = torch.Generator().manual_seed(0)
    heights = {
        "img_in": 3072,
        "txt_in": 3072,
        "final_layer.linear": 64,
        "final_layer.adaLN_modulation.1": 6144,
        **{
            f"{n}_in.{m}_layer": 3072 for n in ("time", "vector", "guidance") for m in ("in", "out")
        },
    }
    for i in range(double):
        for side in ("img", "txt"):
            block = f"double_blocks.{i}.{side}"
            heights |= {f"{block}_mod.lin": 18432, f"{block}_mlp.0": 12288, f"{block}_mlp.2": 3072}
            heights |= {f"{block}_attn.qkv": 9216, f"{block}_attn.proj": 3072}
    for i in range(single):
        block = f"single_blocks.{i}"
        heights |= {f"{block}.linear1": 21504, f"{block}.linear2": 3072}
        heights |= {f"{block}.modulation.lin": 9216}
    tensors = {
        f"{name}.{kind}": torch.randn(rows, *more, generator=source)
        for name, rows in heights.items()
        for kind, more in (("weight", (1,)), ("bias", ()))
    }
    norms = [f"double_blocks.{i}.{s}_attn.norm" for i in range(double) for s in ("img", "txt")]
    for norm in (*norms, *(f"single_blocks.{i}.norm" for i in range(single))):
        for kind in ("query", "key"):
            tensors[f"{norm}.{kind}_norm.scale"] = torch.randn(128, generator=source)
    return tensors


@pytest.mark.parametrize("prefix", ["", PREFIX])
def test_names_are_those_of_the_published_converter(prefix: str) -> None:
    given = {prefix + name: tensor for name, tensor in published_names().items()}
    ours = NAMES.converted(given)
    theirs = convert_flux_transformer_checkpoint_to_diffusers(dict(given))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    again = NAMES.converted(ours)
    assert all(again[name] is ours[name] for name in ours)
    assert len(again) == len(ours)


def random_lora(rank: int) -> Tensors:
    """A LoRA of every layer inside the blocks, at the published heights."""
    source = torch.Generator().manual_seed(1)
    tensors: Tensors = {}
    for name, weight in NAMES.converted(published_names()).items():
        layer = name.removesuffix(".weight")
        if layer == name or ".norm_" in name or weight.ndim == 1:
            continue
        tensors[f"{layer}.lora_A.weight"] = torch.randn(rank, 3, generator=source)
        tensors[f"{layer}.lora_B.weight"] = torch.randn(len(weight), rank, generator=source)
    return tensors


def updates(tensors: Tensors, scale: float = 1.0) -> Tensors:
    ends = (".lora_A.weight", ".lora_B.weight")
    layers = [name.removesuffix(ends[0]) for name in tensors if name.endswith(ends[0])]
    return {layer: tensors[layer + ends[1]] @ tensors[layer + ends[0]] * scale for layer in layers}


@pytest.mark.parametrize("left", ["", "to_k", "to_q,to_k,to_v", "proj_mlp,add_q_proj"])
def test_an_opened_lora_is_the_same_in_the_pipeline(left: str) -> None:
    """Also where only some of the layers that are one there have a LoRA."""
    tensors = random_lora(rank=4)
    for part in filter(None, left.split(",")):
        tensors = {n: t for n, t in tensors.items() if f".{part}." not in n}
    inside = {n: t for n, t in tensors.items() if "transformer_blocks." in n}
    opened = KOHYA.write({"dit": lora_of(inside, 0.5)}, RULES).tensors
    key = "lora_unet_double_blocks_0_img_attn_qkv"
    if "to_q" not in left:
        assert opened[f"{key}.lora_down.weight"].shape == (12, 3)
        assert opened[f"{key}.lora_up.weight"].shape == (9216, 12)
        assert float(opened[f"{key}.alpha"]) == 6.0
    theirs = updates(FluxPipeline.lora_state_dict(dict(opened)))
    for layer, update in updates(inside, 2.0 / 4).items():
        other = theirs.pop(f"transformer.{layer}")
        assert float((other - update).abs().max()) <= 1e-5
    assert not any(update.any() for update in theirs.values())
    for format_name in ("kohya", "comfyui", "guide", "diffusers", "peft"):
        # Of the last norm's names in the guide's format nobody is sure.
        held = {n: t for n, t in tensors.items() if format_name != "guide" or "norm_out" not in n}
        written = find_format(format_name).write({"dit": lora_of(held, 0.5)}, RULES).tensors
        closed = find_format(format_name).read(written, RULES)["dit"]
        assert {f"{n}.lora_A.weight" for n in closed.down} == {n for n in held if "_A." in n}
        for layer, a in closed.down.items():
            assert torch.equal(a, tensors[f"{layer}.lora_A.weight"])
            b = closed.up[layer] * closed.scale[layer]
            assert torch.equal(b, tensors[f"{layer}.lora_B.weight"] * 0.5)


def test_a_foreign_fused_lora_shares_its_a() -> None:
    """Tools that train the fused layer have one A for all of its parts."""
    source = torch.Generator().manual_seed(2)
    key = "lora_unet_single_blocks_1_linear1"
    foreign = {
        f"{key}.lora_down.weight": torch.randn(8, 3, generator=source),
        f"{key}.lora_up.weight": torch.randn(21504, 8, generator=source),
        f"{key}.alpha": torch.tensor(4.0),
    }
    read = KOHYA.read(foreign, RULES)["dit"]
    closed = with_dots("", read, alphas=False)
    theirs = updates(FluxPipeline.lora_state_dict(dict(foreign)))
    assert len(theirs) == 4
    for layer, update in updates(closed, 4.0 / 8).items():
        assert float((theirs[f"transformer.{layer}"] - update).abs().max()) <= 1e-5


def test_layers_that_the_pipeline_leaves_out_are_told() -> None:
    """diffusers reads none of the layers outside the blocks from this format."""
    tensors = {f"x_embedder.lora_{n}.weight": torch.ones(4, 4) for n in "AB"}
    opened = KOHYA.write({"dit": lora_of(tensors, 1.0)}, RULES).tensors
    assert "lora_unet_img_in.lora_down.weight" in opened
    with pytest.raises(ValueError, match=r"leaves x_embedder\.lora_"):
        RULES["dit"].load(torch.nn.Module(), opened, {})


def test_every_alias_reaches_layers_of_its_own() -> None:
    """And together they reach all that lie in the blocks."""
    with torch.device("meta"):
        dit = FluxTransformer2DModel(**ARCHITECTURE, num_layers=2, num_single_layers=2)
    family = find_family("flux")
    reached: list[str] = []
    base = {"dataset_base_path": "d", "dataset_metadata_path": "m.csv", "model_paths": ["x"]}
    for alias in LORA_ALIASES:
        config = make_config({**base, "lora_base_model": "dit", "lora_target_modules": [alias]})
        reached += lora_targets(config, family, dit, "dit")
    inside = [
        name
        for name, module in dit.named_modules()
        if isinstance(module, torch.nn.Linear) and "transformer_blocks." in name
    ]
    assert sorted(reached) == sorted(inside)
