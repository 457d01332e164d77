"""What a dry run says of the files: what is trained on, for how long, and what would be refused."""

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from conftest import Values, train, train_to_end, why_refused, write_images
from PIL import Image

from diffsynth_dagster.run.record import read_record
from diffsynth_dagster.train import main

GONE = "/nowhere/diffusion_pytorch_model.safetensors"


def plan_of(
    given: Mapping[str, Any], folder: Path, capsys: pytest.CaptureFixture[str]
) -> tuple[dict[str, Any], str]:
    """The plan, and what is said beside it."""
    code, _ = train(dict(given), folder, "--dry_run")
    output = capsys.readouterr()
    assert code == 0, output.err
    return json.loads(output.out), output.err


def refusal_of(
    given: Mapping[str, Any], folder: Path, capsys: pytest.CaptureFixture[str], *flags: str
) -> str:
    code, _ = train(dict(given), folder, "--dry_run", *flags)
    output = capsys.readouterr()
    assert (code, output.out) == (2, "")
    return output.err


@dataclass(frozen=True)
class Trained:
    """A training of pictures of two sizes, and the run folder that it left."""

    given: dict[str, Any]
    run: Path


@pytest.fixture(scope="module")
def trained(shared_values: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Trained:
    place = tmp_path_factory.mktemp("dry")
    data = write_images(place / "data", 9)
    for file in sorted(data.glob("*.png"))[:3]:
        Image.open(file).resize((64, 32)).save(file)
    table = data / "metadata.csv"
    table.write_text(table.read_text() + "gone.png,a picture that is not there\n")
    given = {
        **shared_values,
        "dataset_base_path": str(data),
        "dataset_metadata_path": str(table),
        "max_rejected_fraction": 0.2,
        "validation_split": 2,
        "dataset_repeat": 3,
        "num_epochs": 2,
        "cache_path": str(place / "cache"),
    }
    train_to_end(given, place / "run")
    return Trained(given, place / "run")


def test_what_the_training_does_is_said_before(
    trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, cache = tmp_path / "run", tmp_path / "cache"
    plan, _ = plan_of({**trained.given, "cache_path": str(cache)}, run, capsys)
    data, record = plan["data"], read_record(trained.run)
    assert data["rows"] == {"ok": 9, "file_missing": 1}
    assert len(data["rejected"]) == 1
    assert data["rejected"][0].startswith("row 10: image 'gone.png': the file does not exist")
    assert (data["samples"], data["held_out"]) == (record.samples, 2) == (7, 2)
    assert sorted(data["sizes"]) == ["32x32", "64x32"]
    assert list(data["sizes"].values()) == sorted(data["sizes"].values(), reverse=True)
    assert (sum(data["sizes"].values()), data["buckets"]) == (7, 2)
    assert plan["course"] == {
        "processes": 1,
        "steps": record.total_steps,
        "steps_per_epoch": record.total_steps // 2,
        "epochs": 2,
        "checkpoints": 2,
        "visits_of_a_sample": 6,
    }
    assert plan["models"] == "all are there, and fit"
    assert not run.exists()
    written = {path.name.partition("-")[0] for path in cache.iterdir()}
    assert written == {"facts.sqlite", ".facts.sqlite.lock"}


def test_an_encoded_data_set_is_counted_by_its_list(
    trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, _ = plan_of(trained.given, tmp_path / "first", capsys)
    given = {k: v for k, v in trained.given.items() if k != "dataset_metadata_path"}
    given |= {"task": "sft:train", "dataset_base_path": str(trained.run)}
    second, _ = plan_of(given, tmp_path / "second", capsys)
    counts = ("samples", "held_out", "sizes", "buckets")
    assert [second["data"][name] for name in counts] == [first["data"][name] for name in counts]
    assert second["course"] == first["course"]

    moved = tmp_path / "moved"
    shutil.move(Path(trained.given["cache_path"]) / "shards", moved)
    shutil.move(Path(trained.given["cache_path"]) / "index", tmp_path / "index")
    try:
        assert "the store lacks" in refusal_of(given, tmp_path / "second", capsys)
    finally:
        shutil.move(moved, Path(trained.given["cache_path"]) / "shards")
        shutil.move(tmp_path / "index", Path(trained.given["cache_path"]) / "index")
    given["dataset_base_path"] = str(tmp_path)
    assert "no encoded data set" in refusal_of(given, tmp_path / "second", capsys)


def test_steps_are_those_of_as_many_processes(
    values: Values, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    given = values(batch_size=1, gradient_accumulation_steps=2)
    assert plan_of(given, tmp_path / "run", capsys)[0]["course"]["steps"] == 4
    two = plan_of({**given, "num_processes": 2}, tmp_path / "run", capsys)[0]["course"]
    assert (two["processes"], two["steps"]) == (2, 2)
    monkeypatch.setenv("WORLD_SIZE", "4")
    four = plan_of({**given, "num_processes": 2}, tmp_path / "run", capsys)[0]["course"]
    assert (four["processes"], four["steps"]) == (4, 1)
    del given["gradient_accumulation_steps"]
    short = plan_of({**given, "max_train_steps": 3}, tmp_path / "run", capsys)[0]["course"]
    assert (short["steps"], short["epochs"], short["visits_of_a_sample"]) == (3, 1.5, 1.5)
    monkeypatch.setenv("RANK", "1")
    train_to_end(given, tmp_path / "run", "--dry_run")
    assert capsys.readouterr().out == ""  # one process speaks for all


def test_too_many_rejected_rows_are_refused(
    trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = {**trained.given, "max_rejected_fraction": 0.0}
    error = refusal_of(given, tmp_path / "run", capsys)
    assert "9 of 10 rows are usable; 1 is rejected: 1 file missing" in error
    train_to_end(given, tmp_path / "run", "--dry_run", "--no_files")
    assert "data" not in json.loads(capsys.readouterr().out)


def test_tables_beside_the_data_set_are_checked(
    values: Values, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    held_out = tmp_path / "held_out.csv"
    first = (pictures / "metadata.csv").read_text().splitlines()[:2]
    held_out.write_text("\n".join(first))
    given = values(validation_metadata_path=str(held_out))
    assert "hold out is trained on as well" in refusal_of(given, tmp_path / "run", capsys)
    held_out.write_text(f"{first[0]}\ngone.png,none")
    assert "0 of 1 rows are usable" in refusal_of(given, tmp_path / "run", capsys)
    prompts = tmp_path / "prompts.csv"
    prompts.write_text("other\nnone")
    error = refusal_of(values(sample_table=str(prompts)), tmp_path / "run", capsys)
    assert "has no column 'prompt'" in error


def test_what_the_training_warns_of_is_said(
    values: Values, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_images(tmp_path / "data", 2)
    Image.new("RGBA", (32, 32), (9, 9, 9, 0)).save(min(data.glob("*.png")))
    table = data / "metadata.csv"
    table.write_text(table.read_text() + f"1.png,{'word ' * 1000}\n")
    given = values(dataset_base_path=str(data), dataset_metadata_path=str(table))
    _, said = plan_of(given, tmp_path / "run", capsys)
    assert "warning: row 1 has pictures with transparent pixels" in said
    assert "warning: the caption of row 3 is longer than the" in said
    assert "long_captions.parquet" not in said


def make_none(folder: Path) -> None:
    raise AssertionError(f"a dry run makes no data in {folder}")


def test_data_that_a_function_makes_is_not_made(
    values: Values, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = {"customized_dataset": f"{__name__}.make_none"}
    given = values(**made, dataset_metadata_path=str(tmp_path / "later.csv"))
    plan, _ = plan_of(given, tmp_path / "run", capsys)
    assert plan["data"] == f"made by {__name__}.make_none when the training begins"
    assert "course" not in plan
    plan, _ = plan_of(values(**made), tmp_path / "run", capsys)  # it was made before
    assert plan["data"]["rows"] == {"ok": 8}


def test_models_that_are_not_there_are_named_or_downloaded_later(
    values: Values,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("MODELSCOPE_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("DIFFSYNTH_MODEL_BASE_PATH", str(tmp_path / "models"))
    assert f"model_paths = {GONE}" in refusal_of(values(model_paths=[GONE]), tmp_path / "r", capsys)
    hub = "Qwen/Qwen-Image:transformer/*.safetensors"
    files = values()["model_paths"][1:]
    given = values(model_paths=files, model_id_with_origin_paths=hub)
    plan, _ = plan_of(given, tmp_path / "run", capsys)
    assert plan["models"].startswith("not all are there")
    assert plan["data"]["samples"] == 8
    assert not (tmp_path / "models").exists()
    monkeypatch.setenv("DIFFSYNTH_SKIP_DOWNLOAD", "true")
    assert "no file matches" in refusal_of(given, tmp_path / "run", capsys)
    # What the files show, and not their names.
    layers = values(lora_target_modules=["to_nothing"])
    assert "to_nothing" in refusal_of(layers, tmp_path / "run", capsys)


def test_no_files_is_said_of_a_dry_run(
    values: Values, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "--no_files is given but no --dry_run" in why_refused(
        values(), tmp_path / "run", "--no_files"
    )
    assert main(["--dry_run", "--no_file"]) == 2
    assert "did you mean 'no_files'" in capsys.readouterr().err
