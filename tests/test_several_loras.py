"""LoRAs on several modules in one training."""

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_config, train_to_end
from diffusers import FluxPipeline
from families.flux.cases import parts_of, write
from families.flux.training import Values, exports, make_values
from safetensors.torch import load_file

from diffsynth_dagster.errors import ParameterError, TargetError
from diffsynth_dagster.families import find_family
from diffsynth_dagster.preflight import check_headers
from diffsynth_dagster.training.lora_targets import lora_target_names
from diffsynth_dagster.weights.hub import ModelHub
from diffsynth_dagster.weights.identify import find_model

BOTH = {"lora_base_model": "dit,text_encoder", "lora_target_modules": None}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("flux") / "model"
    write(folder)
    return folder


@pytest.fixture(scope="module")
def values(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Values:
    return make_values(model, tmp_path_factory.mktemp("values"))


def test_they_are_one_file_that_the_pipeline_loads(
    values: Values, model: Path, tmp_path: Path
) -> None:
    given = values(**BOTH, num_epochs=2)
    run = train_to_end(given, tmp_path / "run")
    checkpoint = load_file(run / "epoch-1.safetensors")
    encoder = {n: t for n, t in checkpoint.items() if n.startswith("text_encoder.")}
    assert encoder
    assert len(encoder) < len(checkpoint)
    assert all(t.any() for n, t in checkpoint.items() if "lora_B" in n)
    (exported,) = exports(given, run)
    assert exported.components == ("dit", "text_encoder")
    assert exported.tensors == len(checkpoint)
    pipeline: Any = FluxPipeline(**parts_of(model / "diffusers"))
    pipeline.load_lora_weights(exported.path)
    for module, tensors in ((pipeline.text_encoder, encoder), (pipeline.transformer, checkpoint)):
        loaded = {
            name.replace(".default_0.", "."): p
            for name, p in module.named_parameters()
            if ".lora_" in name
        }
        names = {n.partition(".")[2]: t for n, t in tensors.items()}
        assert all(torch.equal(names[name], tensor) for name, tensor in loaded.items())
        assert len(loaded) > 0


def test_a_target_is_for_the_module_whose_usual_layer_it_is(values: Values) -> None:
    named = ["a_to_qkv", "q_proj", "norm.linear"]
    config = make_config(values(**{**BOTH, "lora_target_modules": named}))
    family = find_family("flux")
    assert lora_target_names(config, family, "dit") == ("a_to_qkv", "norm.linear")
    assert lora_target_names(config, family, "text_encoder") == ("q_proj",)


def test_a_module_without_a_target_is_refused(values: Values) -> None:
    config = make_config(values(**{**BOTH, "lora_target_modules": ["a_to_qkv"]}))
    found = find_model(config, ModelHub(Path(), skip_download=True))
    with pytest.raises(TargetError, match="no LoRA target is for 'text_encoder'"):
        check_headers(config, found, torch.float32)


def test_one_file_starts_no_two_loras(values: Values) -> None:
    with pytest.raises(ParameterError, match="names several models"):
        make_config(values(**BOTH, lora_checkpoint="a.safetensors"))
