"""Samples of the rows of a table: what is read of them, at which sizes, and by which half."""

import csv
import json
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import record_of, train, train_to_end, why_refused
from families.wanvideo.cases import write_video
from PIL import Image
from test_families import QWEN, WAN, Place, place, places

from diffsynth_dagster.cache.layout import SAMPLES_FOLDER
from diffsynth_dagster.cache.manifest import read_manifest
from diffsynth_dagster.cache.store import Store
from diffsynth_dagster.data.media.video import load_sample_video
from diffsynth_dagster.run.events import MEASURED

__all__ = ["place", "places"]

EDIT = [case for case in QWEN if case.name == "qwen_image_edit"]
edits = pytest.mark.parametrize("place", EDIT, ids=["edit"], indirect=True)


def table(folder: Path, *sizes: tuple[int, int], **columns: Any) -> Path:
    """A table of samples in a folder of its own, with an edit image of each size."""
    folder.mkdir(parents=True)
    rows: list[dict[str, Any]] = []
    for number, size in enumerate(sizes):
        pixels = np.random.default_rng(number).integers(0, 255, (*size[::-1], 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
        rows.append({"prompt": f"edit {number}", "edit_image": f"{number}.png", **columns})
    (folder / "samples.json").write_text(json.dumps(rows))
    return folder / "samples.json"


def given(place: Place, samples: Path, **more: Any) -> dict[str, Any]:
    return place.values(
        batch_size=4, sample_table=str(samples), sample_num_inference_steps=1, **more
    )


def sizes_of(run: Path) -> list[tuple[int, int]]:
    rows = read_manifest(run / SAMPLES_FOLDER).frame.sort("row")
    # With guidance, each row is there twice.
    return rows.head(rows.height // 2).select("width", "height").rows()


def pictures_of(run: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (run / "samples").iterdir()}


@edits
def test_a_sample_has_the_size_of_its_input_or_that_of_the_recipe(
    place: Place, tmp_path: Path
) -> None:
    """Without a file of what is trained on; where the table names one, its size."""
    samples = table(tmp_path / "s", (64, 64), (128, 32))
    run = train_to_end(given(place, samples, task="sft:data_process"), tmp_path / "own")
    own = sizes_of(run)
    assert own[0][0] == own[0][1]
    assert own[1][0] > own[1][1]
    fixed = given(place, samples, task="sft:data_process", height=32, width=64)
    assert sizes_of(train(fixed, tmp_path / "fixed")[1]) == [(64, 32)] * 2
    named = table(tmp_path / "n", (64, 64), image="target.png")
    Image.new("RGB", (48, 32)).save(named.parent / "target.png")
    run = train_to_end(given(place, named, task="sft:data_process"), tmp_path / "named")
    assert sizes_of(run) == [(48, 32)]


@edits
def test_the_second_half_makes_the_samples_of_the_first(place: Place, tmp_path: Path) -> None:
    """From the store alone: the pictures of the table are gone."""
    values = given(place, table(tmp_path / "s", (64, 64)), sample_cfg_scale=2.0)
    whole = train_to_end(values, tmp_path / "whole")
    train_to_end({**values, "task": "sft:data_process"}, tmp_path / "split")
    (tmp_path / "s" / "0.png").unlink()
    second = {**values, "task": "sft:train", "dataset_base_path": str(tmp_path / "split")}
    del second["dataset_metadata_path"]
    train_to_end(second, tmp_path / "second")
    made, alone = pictures_of(whole), pictures_of(tmp_path / "second")
    assert made.keys() == alone.keys()
    for name in made:
        with Image.open(BytesIO(made[name])) as beside, Image.open(BytesIO(alone[name])) as picture:
            left = beside.width - picture.width
            assert left > 0  # the picture to edit
            sample = beside.crop((left, 0, beside.width, beside.height))
            assert sample.tobytes() == picture.tobytes()
    manifest = read_manifest(whole / SAMPLES_FOLDER)
    assert manifest.samples == 2  # with the prompt, and with the negative one
    assert Store(Path(manifest.store)).missing(manifest.keys).is_empty()


@edits
def test_a_text_encoder_that_is_trained_sees_the_rows(place: Place, tmp_path: Path) -> None:
    """Its stage runs when a sample is made, with the picture of the row."""
    values = given(place, table(tmp_path / "s", (64, 64)), sample_cfg_scale=2.0)
    values = {n: v for n, v in values.items() if not n.startswith("lora_")}
    values |= {"trainable_models": ["text_encoder"], "remove_prefix_in_ckpt": ""}
    values |= {"learning_rate": 0.1}
    run = train_to_end(values, tmp_path / "run")
    columns = read_manifest(run / SAMPLES_FOLDER).frame.columns
    assert {name for name in columns if name.startswith("input:")} == {
        "input:prompt",
        "input:edit_image",
    }
    made = pictures_of(run)
    assert len(set(made.values())) == len(made) > 1  # what is trained shows in the samples


@edits
def test_other_samples_are_another_training(place: Place, tmp_path: Path) -> None:
    """And the same table is the same one."""
    identities: list[str] = []
    for name, size in (("a", (64, 64)), ("b", (64, 64)), ("c", (64, 32))):
        samples = tmp_path / "s" / "samples.json"
        table(tmp_path / name, size).rename(tmp_path / name / "made.json")
        samples.parent.mkdir(exist_ok=True)
        for file in ("0.png", "made.json"):
            target = samples if file == "made.json" else samples.parent / file
            target.write_bytes((tmp_path / name / file).read_bytes())
        record = record_of(train(given(place, samples), tmp_path / f"run{name}")[1])
        identities.append(record.identity)
    assert identities[0] == identities[1] != identities[2]


@edits
@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"edit_image": "lost.png"}, "1 of 1 rows cannot be used: row 1: "),
        ({"prompt": ""}, "the caption is empty"),
        ({"edit_image": "../0.png"}, "outside"),
    ],
)
def test_a_row_that_cannot_be_used_is_refused(
    place: Place, change: dict[str, str], said: str, tmp_path: Path
) -> None:
    samples = table(tmp_path / "s", (64, 64), **change)
    words = why_refused(given(place, samples), tmp_path / "run")
    assert said in words
    assert "sample_table = " in words
    assert "Traceback" not in words


@edits
def test_what_does_not_go_together_is_refused(place: Place, tmp_path: Path, capsys: Any) -> None:
    samples = table(tmp_path / "s", (64, 64))
    texts = {**given(place, samples), "sample_prompts": ["a", "b"]}
    del texts["sample_table"]
    assert train(texts, tmp_path / "texts")[0] == 2
    assert "give a table with the columns prompt, edit_image" in " ".join(
        capsys.readouterr().err.split()
    )
    missing = given(place, tmp_path / "no.csv")
    assert f"sample_table = {tmp_path / 'no.csv'}" in why_refused(missing, tmp_path / "missing")
    first = given(place, samples, task="sft:data_process", sample_cfg_scale=1.0)
    train_to_end(first, tmp_path / "split")
    guided = given(place, samples, task="sft:train")
    base = {"dataset_base_path": str(tmp_path / "split"), "dataset_metadata_path": None}
    second = {k: v for k, v in {**guided, **base}.items() if v is not None}
    # With all models listed, the second half encodes its own samples.
    run = train_to_end(second, tmp_path / "encodes")
    assert read_manifest(run / SAMPLES_FOLDER).samples == 2
    second["model_paths"] = [p for p in second["model_paths"] if "text_encoder" not in str(p)]
    assert "without the negative prompt" in why_refused(second, tmp_path / "second")
    del first["sample_cfg_scale"]
    train_to_end({**first, "sample_negative_prompt": "grey"}, tmp_path / "split")
    assert "encoded for samples with another negative prompt" in why_refused(
        second, tmp_path / "second"
    )
    samples.write_text(samples.read_text() + " ")
    second["sample_cfg_scale"] = 1.0
    assert "encoded with another table of samples" in why_refused(second, tmp_path / "second")


@pytest.mark.parametrize(
    "place", [c for c in WAN if c.name == "wan_i2v"], ids=["i2v"], indirect=True
)
def test_a_picture_is_the_first_frame_of_a_clip(place: Place, tmp_path: Path) -> None:
    """It stands still for as long as a sample is, as does a clip that is shorter."""
    folder = tmp_path / "s"
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "first.png")
    (folder / "samples.csv").write_text("prompt,video\na clip,first.png\n")
    values = given(place, folder / "samples.csv")
    run = train_to_end(values, tmp_path / "run")
    record = record_of(run)
    assert "step-0-0" in record.clips
    assert set(read_manifest(run / SAMPLES_FOLDER).frame["frames"]) == {5}
    still = load_sample_video(folder / "first.png", (32, 32), 5, 1.0)
    assert still.shape == (3, 5, 32, 32)
    assert (still == still[:, :1]).all()
    write_video(folder / "short.mp4", 0, 32, frames=3)
    short = load_sample_video(folder / "short.mp4", (32, 32), 5, 1.0)
    assert (short[:, 2:] == short[:, 2:3]).all()
    assert not (short[:, 1] == short[:, 2]).all()
    taken = load_sample_video(folder / "short.mp4", (32, 32), 5, 1.0, [0, 1, 2])
    assert torch.equal(taken, short)


@edits
def test_samples_change_no_weight_and_no_loss(place: Place, tmp_path: Path) -> None:
    """However often they are made: nothing of them is drawn from what a training draws from."""
    plain = place.values(batch_size=2, seed=3)
    samples = {"sample_table": str(table(tmp_path / "s", (64, 64))), "sample_steps": 1}
    found: list[Any] = []
    for name, more in (("plain", {}), ("sampled", {**samples, "sample_num_inference_steps": 1})):
        run = train_to_end({**plain, **more}, tmp_path / name)
        with (run / "metrics.csv").open() as file:
            rows = [{k: v for k, v in r.items() if k not in MEASURED} for r in csv.DictReader(file)]
        found.append(rows)
        found.append(_weights(run))
    assert found[0] == found[2]
    assert found[1] == found[3]


def _weights(run: Path) -> dict[str, bytes]:
    from safetensors.torch import load_file

    tensors = load_file(run / "epoch-0.safetensors")
    return {name: tensor.numpy().tobytes() for name, tensor in tensors.items()}
