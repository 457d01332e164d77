"""Split training: what the second half takes over from the first, and what it refuses."""

import json
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import yaml
from conftest import Values, train, train_to_end, why_refused
from families.wanvideo.cases import CASES, write
from family_case import Case
from safetensors.torch import load_file, save_file

WAN = {case.name: case for case in CASES}


def second_half(config: dict[str, Any], encoded: Path, **overrides: Any) -> dict[str, Any]:
    """The denoiser alone, on an encoded folder."""
    given = {
        **{k: v for k, v in config.items() if k not in ("dataset_metadata_path", "max_pixels")},
        "dataset_base_path": str(encoded),
        "model_paths": config["model_paths"][:1],
        "task": "sft:train",
    }
    return given | overrides


@pytest.fixture
def encoded(values: Values, tmp_path: Path) -> tuple[dict[str, Any], Path]:
    config = values(max_pixels=256, cache_path=str(tmp_path / "cache"))
    folder = train_to_end(config, tmp_path / "encoded", "--task", "sft:data_process")
    return config, folder


def test_the_size_of_the_first_half_counts(
    encoded: tuple[dict[str, Any], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, folder = encoded
    train_to_end(second_half(config, folder), tmp_path / "run")
    written = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text(encoding="utf-8"))
    assert written["max_pixels"] == 256
    train_to_end(second_half(config, folder, max_pixels=256), tmp_path / "same")
    first, same = (tmp_path / name / "epoch-0.safetensors" for name in ("run", "same"))
    assert first.read_bytes() == same.read_bytes()
    capsys.readouterr()
    for name, value in (("max_pixels", 1024), ("bucket_step", 32)):
        other = second_half(config, folder, **{name: value})
        assert f"encoded with {name} = " in why_refused(other, tmp_path / "other")


def test_a_folder_of_before_sizes_were_noted_is_read(
    encoded: tuple[dict[str, Any], Path], tmp_path: Path
) -> None:
    config, folder = encoded
    path = folder / "samples.parquet"
    notes = json.loads(pl.read_parquet_metadata(path)["diffsynth_dagster"])
    del notes["parameters"]
    frame = pl.read_parquet(path)
    frame.write_parquet(path, metadata={"diffsynth_dagster": json.dumps(notes)})
    train_to_end(second_half(config, folder), tmp_path / "run")


def test_weights_that_did_not_encode_the_data_are_refused(
    encoded: tuple[dict[str, Any], Path], tmp_path: Path
) -> None:
    config, folder = encoded
    (vae,) = (path for path in config["model_paths"] if "vae" in path)
    tensors = load_file(vae)
    first = min(tensors)
    tensors[first] = tensors[first] + 1
    other = tmp_path / "vae" / "other.safetensors"
    other.parent.mkdir()
    save_file(tensors, other)
    (other.parent / "config.json").write_text(Path(vae).with_name("config.json").read_text())
    models = [config["model_paths"][0], str(other)]
    assert f"encoded with another 'vae' than {other}" in why_refused(
        second_half(config, folder, model_paths=models), tmp_path / "run"
    )
    same = [config["model_paths"][0], vae]
    train_to_end(second_half(config, folder, model_paths=same), tmp_path / "run")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wan") / "model"
    write(folder)
    return folder


@pytest.mark.parametrize("case", [WAN["wan22_ti2v_5b"], WAN["wan_i2v"]], ids=lambda c: c.name)
def test_each_half_names_only_the_models_that_it_needs(
    case: Case, model: Path, tmp_path: Path
) -> None:
    """What a first frame becomes is told without the transformer, and CLIP is not asked for
    again."""
    table = case.rows(tmp_path / "data")
    config = {
        "family": case.family,
        "dataset_base_path": str(table.parent),
        "dataset_metadata_path": str(table),
        "lora_base_model": "dit",
        "lora_rank": 4,
        **case.models(model, "diffusers"),
        **case.parameters,
    }
    whole = {**config, "cache_path": str(tmp_path / "c1")}
    train_to_end(whole, tmp_path / "whole")
    assert "transformer" in config["model_paths"][0]
    first = {**config, "cache_path": str(tmp_path / "c2"), "task": "sft:data_process"}
    first["model_paths"] = config["model_paths"][1:]
    train_to_end(first, tmp_path / "encoded")
    assert (
        train(
            second_half(first, tmp_path / "encoded") | {"model_paths": config["model_paths"][:1]},
            tmp_path / "split",
        )[0]
        == 0
    )
    ends = [(tmp_path / name / "epoch-0.safetensors").read_bytes() for name in ("whole", "split")]
    assert ends[0] == ends[1]
