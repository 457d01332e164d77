"""Which models of Stable Diffusion 1.5 are taken, and which are refused before anything is encoded."""

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_config, train_to_end, why_refused
from diffusers import AutoencoderKL, ControlNetModel, UNet2DConditionModel
from families.stable_diffusion.cases import (
    ARCHITECTURE,
    CASES,
    CONTROL,
    CONTROLNET,
    TEXT,
    UP,
    rows,
    rows_with_control,
    write,
)
from families.stable_diffusion.training import HUB, values_of
from families.stable_diffusion_xl.cases import ARCHITECTURE as XL_ARCHITECTURE
from families.stable_diffusion_xl.cases import UP as XL_UP
from safetensors.torch import load_file, save_file

from diffsynth_dagster.errors import UserError
from diffsynth_dagster.weights.identify import find_model
from diffsynth_dagster.weights.load import load_component

CASE = CASES[0]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sd15")
    write(folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return rows(tmp_path_factory.mktemp("data") / "plain")


def save_unet(folder: Path, **settings: Any) -> str:
    UNet2DConditionModel(**{**ARCHITECTURE, "up_block_types": UP, **settings}).save_pretrained(
        folder
    )
    return str(folder / "diffusion_pytorch_model.safetensors")


def save_controlnet(folder: Path, extra: str | None = None, **settings: Any) -> str:
    blocks = {"conditioning_embedding_out_channels": (8, 8, 16, 16)}
    ControlNetModel(**{**ARCHITECTURE, **blocks, **settings}).save_pretrained(folder)
    path = folder / "diffusion_pytorch_model.safetensors"
    if extra is not None:
        save_file({**load_file(path), extra: torch.zeros(2)}, path)
    return str(path)


def save_vae(folder: Path, channels: int) -> str:
    widths = {"block_out_channels": (32,) * 4, "layers_per_block": 1}
    AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=channels,
        **widths,
    ).save_pretrained(folder)
    return str(folder / "diffusion_pytorch_model.safetensors")


def save_encoder(folder: Path, **settings: Any) -> str:
    from transformers import CLIPTextConfig, CLIPTextModel

    CLIPTextModel(CLIPTextConfig(**{**TEXT, **settings})).save_pretrained(folder)
    return str(folder / "model.safetensors")


@pytest.mark.parametrize(
    ("place", "entry", "words"),
    [
        (
            0,
            lambda f: save_unet(f, cross_attention_dim=1024),
            "the UNet is that of Stable Diffusion 2",
        ),
        (0, lambda f: save_unet(f, in_channels=9), "reads more than the noisy latents"),
        (
            0,
            lambda f: save_unet(f, **{**XL_ARCHITECTURE, "up_block_types": XL_UP}),
            "the file is no component of stable_diffusion",
        ),
        (
            1,
            lambda f: save_encoder(f, hidden_size=1024, num_attention_heads=16),
            "the text encoder is that of Stable Diffusion 2",
        ),
        (2, lambda f: save_vae(f, channels=16), "'unet' and 'vae' are of different models"),
    ],
    ids=["SD 2", "inpainting", "SDXL", "text encoder of SD 2", "VAE of FLUX.1"],
)
def test_other_models_are_refused(
    model: Path, data: Path, tmp_path: Path, place: int, entry: Any, words: str
) -> None:
    values = values_of(CASE, model, data)
    path = entry(tmp_path / "other")
    values["model_paths"] = [path if i == place else p for i, p in enumerate(values["model_paths"])]
    error = why_refused(values, tmp_path / "run")
    assert words in error
    assert "Traceback" not in error
    assert not (tmp_path / "run" / "samples.parquet").exists()


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        (
            lambda f: save_controlnet(f, "control_add_embedding.linear_1.weight"),
            "the ControlNet is a union of several",
        ),
        (lambda f: save_controlnet(f, conditioning_channels=4), "reads more than an image"),
        (
            lambda f: save_controlnet(f, **XL_ARCHITECTURE),
            "the ControlNet is not one for Stable Diffusion 1.5",
        ),
        (
            lambda f: save_controlnet(f, cross_attention_dim=128),
            "'unet' and 'controlnet' are of different models",
        ),
    ],
    ids=["union", "inpainting", "SDXL", "SD 2"],
)
def test_other_controlnets_are_refused(model: Path, tmp_path: Path, entry: Any, words: str) -> None:
    values = values_of(CASE, model, rows_with_control(tmp_path / "data"), **CONTROL)
    values["model_paths"] = [*values["model_paths"], entry(tmp_path / "other")]
    assert words in why_refused(values, tmp_path / "run")


def test_a_controlnet_and_its_column_go_together(model: Path, data: Path, tmp_path: Path) -> None:
    values = values_of(CASE, model, data)
    given = {**values, "model_paths": [*values["model_paths"], str(model / CONTROLNET)]}
    with pytest.raises(UserError, match="has a ControlNet, but controlnet_image is not given"):
        find_model(make_config(given), HUB)
    with pytest.raises(UserError, match="controlnet_image is given but no ControlNet"):
        find_model(make_config({**values, **CONTROL}), HUB)


def test_a_unet_without_a_middle_is_built_from_its_shapes(
    model: Path, data: Path, tmp_path: Path
) -> None:
    """Small models distilled from this one have none."""
    values = values_of(CASE, model, data)
    path = Path(save_unet(tmp_path / "small", mid_block_type=None))
    path.with_name("config.json").unlink()
    values["model_paths"] = [str(path), *values["model_paths"][1:]]
    found = find_model(make_config(values), HUB).components["unet"]
    built: Any = load_component(found, "cpu", torch.float32)
    assert built.mid_block is None
    state = load_file(path)
    assert all(torch.equal(tensor, state[name]) for name, tensor in built.state_dict().items())
    train_to_end(values, tmp_path / "run")
