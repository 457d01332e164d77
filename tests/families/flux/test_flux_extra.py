"""FLUX.1 with ControlNets and reference images."""

import re
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
from conftest import make_config, train_to_end
from diffusers import (
    AutoencoderKL,
    FluxTransformer2DModel,
)
from families.flux.cases import CONTROLNET, rows, write
from families.flux.training import HUB, Values, exports, make_values
from safetensors.torch import load_file

from diffsynth_dagster.cache.manifest import read_manifest
from diffsynth_dagster.data.table.validate import validate
from diffsynth_dagster.errors import ParameterError
from diffsynth_dagster.export import verify_export
from diffsynth_dagster.facts import FactCache
from diffsynth_dagster.families import find_family
from diffsynth_dagster.families.flux.stages import encode_control, encode_kontext
from diffsynth_dagster.preflight import check_config
from diffsynth_dagster.weights.identify import find_model, guess_model


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("flux")
    write(folder)
    return folder


@pytest.fixture(scope="session")
def values(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Values:
    return make_values(model, tmp_path_factory.mktemp("data"))


def test_three_modules_at_once(values: Values, model: Path, tmp_path: Path) -> None:
    """CLIP and a ControlNet in full, the transformer through a LoRA: a file for each."""
    from diffusers import FluxControlNetModel
    from transformers import CLIPTextModel

    given = values(
        "control",
        trainable_models=["text_encoder", "controlnet"],
        model_paths=[*values()["model_paths"], str(model / "union" / CONTROLNET)],
        data_file_keys=["image", "controlnet_image"],
        extra_inputs=["controlnet_image", "controlnet_processor_id"],
        learning_rate=1e-4,
    )
    run = train_to_end(given, tmp_path / "run")
    columns = read_manifest(run).frame.columns
    assert {"key:prompt", "key:image", "key:control"} <= set(columns)
    assert "key:pooled_prompt" not in columns
    made = {item.components[0]: item for item in exports(given, run)}
    assert made.keys() == {"dit", "text_encoder", "controlnet"}
    found = find_model(make_config({**given, "output_path": str(run)}), HUB)
    for item in made.values():
        verify_export(item, found)
    tensors = load_file(run / "epoch-0.safetensors")
    clip: Any = CLIPTextModel.from_pretrained(made["text_encoder"].path.parent)
    net: Any = FluxControlNetModel.from_pretrained(made["controlnet"].path.parent)
    for prefix, module, folder in (
        ("pipe.text_encoder.", clip, model / "diffusers" / "text_encoder"),
        ("pipe.controlnet.models.0.", net, model / "union" / "controlnet"),
    ):
        (before,) = (load_file(file) for file in folder.glob("*.safetensors"))
        state = module.state_dict()
        assert all(torch.equal(state[name], tensors[prefix + name]) for name in state)
        assert any(not torch.equal(state[name], before[name]) for name in state)


def test_a_controlnet_is_saved_with_bare_names(values: Values, model: Path, tmp_path: Path) -> None:
    given = values(
        "control",
        lora_base_model=None,
        lora_rank=None,
        trainable_models=["controlnet"],
        model_paths=[*values()["model_paths"], str(model / "controlnet" / CONTROLNET)],
        data_file_keys=["image", "controlnet_image"],
        extra_inputs=["controlnet_image"],
        remove_prefix_in_ckpt="pipe.controlnet.models.0.",
    )
    run = train_to_end(given, tmp_path / "run")
    names = load_file(run / "epoch-0.safetensors").keys()
    assert names == load_file(model / "controlnet" / CONTROLNET).keys()
    (exported,) = exports(given, run)
    verify_export(exported, find_model(make_config({**given, "output_path": str(run)}), HUB))


@pytest.mark.parametrize(
    ("net", "extra", "message"),
    [
        ("controlnet", "", "has a ControlNet, but controlnet_image is not given"),
        (None, "controlnet_image", "controlnet_image is given but no ControlNet"),
        (None, "controlnet_processor_id", "given but not controlnet_image"),
        ("union", "controlnet_image", "a union of several"),
        ("controlnet", "controlnet_image,controlnet_processor_id", "has no modes"),
        ("controlnet", "controlnet_image,kontext_images", "do not go together"),
        ("controlnet", "controlnet_image,controlnet_inpaint_mask", "controlnet_inpaint_mask"),
    ],
)
def test_columns_and_controlnets_go_together(
    values: Values, model: Path, net: str | None, extra: str, message: str
) -> None:
    files = [str(model / net / CONTROLNET)] if net else []
    keys = ["image", *(c for c in extra.split(",") if "image" in c)]
    config = make_config(
        values(
            "control",
            model_paths=[*values()["model_paths"], *files],
            extra_inputs=extra,
            data_file_keys=keys,
        )
    )
    with pytest.raises(ParameterError, match=message):
        check_config(config, find_model(config, HUB))


def test_a_mode_is_given_by_its_name(model: Path) -> None:
    loaded = {"vae": AutoencoderKL.from_pretrained(model / "diffusers" / "vae")}
    image = {"controlnet_image": torch.zeros(3, 32, 32)}
    with torch.no_grad():
        (encoded,) = encode_control(loaded, [{**image, "controlnet_processor_id": "depth"}])
        assert int(encoded["control_mode"]) == 2


def test_a_row_of_an_unknown_mode_is_rejected(values: Values, tmp_path: Path) -> None:
    extra = "controlnet_image,controlnet_processor_id"
    given = values("control", extra_inputs=extra, task="sft:data_process")
    table = Path(given["dataset_metadata_path"])
    other = table.with_name("sketch.csv")
    other.write_text(
        re.sub("canny|tile|depth|blur|pose|gray|lq", "sketch", table.read_text(), count=1)
    )
    given |= {"dataset_metadata_path": str(other), "data_file_keys": "image,controlnet_image"}
    config = make_config(given)
    fact_cache = FactCache(tmp_path / "facts.sqlite")
    checked = validate(config, guess_model(config).family.columns, fact_cache)
    assert checked.counts["not_taken"] == 1
    (why,) = checked.rejected.collect()["message"]
    assert "controlnet_processor_id takes one of canny, tile" in why


def test_several_reference_images_are_counted(model: Path) -> None:
    """The i-th has the position (i, h, w), as the authors say: their order matters."""
    loaded = {"vae": AutoencoderKL.from_pretrained(model / "diffusers" / "vae")}
    dit: Any = FluxTransformer2DModel.from_pretrained(model / "diffusers" / "transformer")
    source = torch.Generator().manual_seed(3)
    first, second = (torch.randn(3, *size, generator=source) for size in ((32, 48), (16, 32)))
    family = find_family("flux")
    predictions: list[torch.Tensor] = []
    with torch.no_grad():
        for images in ([first, second], [second, first]):
            (encoded,) = encode_kontext(loaded, [{"kontext_images": images}])
            assert encoded["kontext"].shape == (6 + 2, 16)
            counts = [6, 2] if images[0] is first else [2, 6]
            assert encoded["kontext_ids"][:, 0].tolist() == [1] * counts[0] + [2] * counts[1]
            conditions = {
                "prompt_embeds": torch.zeros(1, 4, 64),
                "pooled_prompt_embeds": torch.zeros(1, 64),
                **{name: tensor[None] for name, tensor in encoded.items()},
            }
            x_t = {"image": torch.ones(1, 4, 4, 6)}
            t = torch.tensor([500.0])
            predictions.append(family.denoise(dit, {"dit": dit}, conditions, x_t, t)["image"])
    assert predictions[0].shape == (1, 4, 4, 6)
    assert float((predictions[0] - predictions[1]).abs().max()) > 1e-5


def test_rows_of_one_and_of_several_reference_images(values: Values, tmp_path: Path) -> None:
    """Each has its own sizes; a batch has samples of one kind. The first row is no list."""
    table = rows(tmp_path / "data", "kontext_images", (48, 32))
    lines = table.read_text().splitlines()
    for row in (2, 4):
        lines[row] = lines[row].replace(",more/", ',"[""0.png"",""more/') + '""]"'
    table.write_text("\n".join(lines))
    given = values(
        dataset_base_path=str(table.parent),
        dataset_metadata_path=str(table),
        data_file_keys=["image", "kontext_images"],
        extra_inputs=["kontext_images"],
        height=None,
        width=None,
    )
    run = train_to_end(given, tmp_path / "run")
    shapes = read_manifest(run).frame["shape"].value_counts().rows()
    assert sorted(shapes) == [("32x32 32x32,48x32", 2), ("32x32 48x32", 2)]
    assert pl.read_csv(run / "metrics.csv").height == 2
