"""Names of other layouts and tools, by tables that any family may have."""

import pytest
import torch

from diffsynth_dagster.families.contract import Tensors
from diffsynth_dagster.families.lora import LoraRules
from diffsynth_dagster.families.shared.fused_names import AuthorsNames
from diffsynth_dagster.families.shared.names import with_new_start, with_new_starts
from diffsynth_dagster.formats.kohya import FORMAT as KOHYA_FORMAT
from diffsynth_dagster.formats.names import lora_of

STARTS = {
    "down.*.down.*.resample.": "blocks.*.sampler.",
    "down.*.down.*.": "blocks.*.resnets.*.",
    "down.": "other.",
    "a.": "b.",
    "b.": "c.",
}


@pytest.mark.parametrize(
    ("name", "renamed"),
    [
        ("down.12.down.3.resample.bias", "blocks.12.sampler.bias"),
        ("down.12.down.3.conv.down.4.bias", "blocks.12.resnets.3.conv.down.4.bias"),
        ("down.x.down.3.bias", "other.x.down.3.bias"),
        ("a.b.weight", "b.b.weight"),
        ("xdown.1.down.2.bias", "xdown.1.down.2.bias"),
        ("downx1xdown.2.bias", "downx1xdown.2.bias"),
    ],
)
def test_the_first_start_that_fits_is_replaced_once(name: str, renamed: str) -> None:
    assert with_new_start(name, STARTS) == renamed


def test_tensors_keep_their_values() -> None:
    tensor = torch.ones(2)
    assert with_new_starts({"a.x": tensor}, STARTS)["b.x"] is tensor


NAMES = AuthorsNames(
    blocks={
        "layers": ("blocks", {"qkv_in": ("to_q", "to_k", "to_v"), "up_down": ("gate", "ff.up")}),
        # As here, but for kohya's underscores.
        "joint_blocks": ("joint_blocks", {"img_mlp.net.2": ("img_mlp.net.2",)}),
    },
    outside={"final_layer.mod": "norm_out"},
    heights={"ff.up": 2},
    swaps=("final_layer.mod",),
    prefix="model.",
    kinds={"scale": "weight"},
)
KOHYA = {
    "blocks.3.to_q": "layers_3_qkv_in",
    "blocks.3.to_v": "layers_3_qkv_in",
    "blocks.10.ff.up": "layers_10_up_down",
    "joint_blocks.0.img_mlp.net.2": "joint_blocks_0_img_mlp_net_2",
    "norm_out": "final_layer_mod",
}


def test_weights_are_taken_apart() -> None:
    qkv, both, halves = torch.randn(6, 2), torch.randn(6), torch.randn(4, 2)
    given = {
        "model.layers.3.qkv_in.weight": qkv,
        "layers.3.up_down.scale": both,
        "final_layer.mod.weight": halves,
        "layers.3.unknown.weight": qkv,
        "joint_blocks.0.img_mlp.net.2.weight": qkv,
    }
    wanted = {
        **{f"blocks.3.to_{x}.weight": qkv[2 * i : 2 * i + 2] for i, x in enumerate("qkv")},
        "blocks.3.gate.weight": both[:2],
        "blocks.3.ff.up.weight": both[2:],
        "norm_out.weight": torch.cat([halves[2:], halves[:2]]),
        "layers.3.unknown.weight": qkv,
        "joint_blocks.0.img_mlp.net.2.weight": qkv,
    }
    converted = NAMES.converted(given)
    assert converted.keys() == wanted.keys()
    assert all(torch.equal(converted[name], wanted[name]) for name in wanted)
    with pytest.raises(RuntimeError, match="7 rows cannot be those of blocks"):
        NAMES.converted({"layers.0.qkv_in.weight": torch.randn(7, 2)})


def test_a_lora_comes_back_from_the_names_of_other_tools() -> None:
    lora: Tensors = {}
    for layer in KOHYA:
        lora[f"{layer}.lora_A.weight"] = torch.randn(2, 5)
        lora[f"{layer}.lora_B.weight"] = torch.randn(8 if layer.endswith("up") else 4, 2)
    rules = {"dit": LoraRules("transformer", lambda *_: None, authors=NAMES)}
    theirs = KOHYA_FORMAT.write({"dit": lora_of(lora, 0.5)}, rules).tensors
    assert {n.partition(".")[0] for n in theirs} == {f"lora_unet_{n}" for n in KOHYA.values()}
    assert theirs["lora_unet_layers_3_qkv_in.lora_up.weight"].shape == (12, 6)
    assert float(theirs["lora_unet_layers_3_qkv_in.alpha"]) == 3.0
    back = KOHYA_FORMAT.read(theirs, rules)["dit"]
    for layer, a in back.down.items():
        assert torch.equal(a, lora.pop(f"{layer}.lora_A.weight"))
        assert torch.equal(back.up[layer], lora.pop(f"{layer}.lora_B.weight"))
    assert not lora
    assert set(back.scale.values()) == {0.5}
