"""Which layers of the published UNet get a LoRA where `lora_target_modules` is empty, as in the guide."""

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_config
from diffusers import UNet2DConditionModel
from safetensors.torch import save_file
from torch import nn

from diffsynth_dagster.errors import WeightsError
from diffsynth_dagster.families import find_family
from diffsynth_dagster.training.lora_targets import lora_targets
from diffsynth_dagster.weights.lora import read_lora, require_start

FAMILY = find_family("stable_diffusion")
LAYERS = 121
"""As many as a LoRA of Stable Diffusion 1.5 by DiffSynth-Studio has."""


@pytest.fixture(scope="module")
def unet() -> Any:
    """The published architecture, without weights."""
    with torch.device("meta"):
        return UNet2DConditionModel(cross_attention_dim=768)


def searched(module: nn.Module, inside: bool = False, name: str = "") -> list[str]:
    """The layers that DiffSynth-Studio's search finds: it goes down to the lists of several modules,
    and takes every wide Linear in them."""
    if isinstance(module, nn.Linear):
        return [name] if inside and min(module.weight.shape) >= 512 else []
    inside = inside or (isinstance(module, nn.ModuleList) and len(module) > 1)
    children = module.named_children()
    return [
        found
        for child, each in children
        for found in searched(each, inside, f"{name}.{child}" if name else child)
    ]


def automatic(unet: Any) -> list[str]:
    base = {"dataset_base_path": "d", "dataset_metadata_path": "m.csv", "model_paths": ["x"]}
    config = make_config({**base, "lora_base_model": "unet", "lora_target_modules": ""})
    return lora_targets(config, FAMILY, unet, "unet")


def test_they_are_those_of_the_guide(unet: Any) -> None:
    layers = automatic(unet)
    assert len(layers) == LAYERS
    assert layers == searched(unet)
    block = "mid_block.attentions.0.transformer_blocks.0."
    of_the_middle = {name.removeprefix(block) for name in layers if name.startswith(block)}
    assert of_the_middle == {"attn1.to_out.0", "attn2.to_out.0", "ff.net.0.proj", "ff.net.2"}


def write_guide(unet: Any, layers: list[str], path: Path) -> None:
    """A LoRA of rank 1 in the names of DiffSynth-Studio."""
    tensors: dict[str, torch.Tensor] = {}
    for layer in layers:
        out, into = unet.get_submodule(layer).weight.shape
        tensors[f"{layer}.lora_A.default.weight"] = torch.ones(1, into)
        tensors[f"{layer}.lora_B.default.weight"] = torch.zeros(out, 1)
    save_file(tensors, path)


def test_a_training_goes_on_with_a_file_of_the_guide(unet: Any, tmp_path: Path) -> None:
    path = tmp_path / "epoch-0.safetensors"
    write_guide(unet, searched(unet), path)
    lora = read_lora(path, FAMILY, "unet", "lora_checkpoint")
    assert len(lora.down) == LAYERS
    require_start(unet, lora, automatic(unet), 1, "lora_checkpoint")


def test_a_file_of_further_layers_names_them(unet: Any, tmp_path: Path) -> None:
    path = tmp_path / "epoch-0.safetensors"
    further = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    write_guide(unet, [*searched(unet), further], path)
    lora = read_lora(path, FAMILY, "unet", "lora_checkpoint")
    with pytest.raises(WeightsError, match=f"has besides '?{further}"):
        require_start(unet, lora, automatic(unet), 1, "lora_checkpoint")
