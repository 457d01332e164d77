"""The data set is made once, checked once, and what was checked is what is encoded and trained."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dagster as dg
import polars as pl
import pytest
from conftest import Values, keys_of, lora_values, train, write_images
from dagster_support import definitions_of, write_recipe
from PIL import Image

from diffsynth_dagster.cache.__main__ import main as maintain
from diffsynth_dagster.cache.manifest import read_manifest
from diffsynth_dagster.cache.store import Store
from diffsynth_dagster.data.table.checked import read_checked

CALLS = "calls.txt"


def make_and_count(folder: Path) -> None:
    """A `customized_dataset` that notes in the folder above that it was called."""
    if not folder.is_dir():
        write_images(folder, 6)
    with (folder.parent / CALLS).open("a") as file:
        file.write("called\n")


def repaint(path: Path, colour: str) -> None:
    """Exchange a picture for another of its size."""
    with Image.open(path) as image:
        size = image.size
    Image.new("RGB", size, colour).save(path)


class Project:
    """A recipe of its own with its data, run asset by asset."""

    def __init__(self, folder: Path, model: Path, instance: dg.DagsterInstance) -> None:
        self.data, self.run_folder, self.store = folder / "data", folder / "run", folder / "store"
        self.values = {
            **lora_values(model, self.data, self.store),
            "customized_dataset": "test_one_table.make_and_count",
            "output_path": str(self.run_folder),
        }
        self._folder, self._instance = folder, instance
        write_recipe(folder / "recipes", "once", self.values)

    def run(self, *kinds: str) -> dg.ExecuteInProcessResult:
        definitions = definitions_of(self._folder / "recipes")
        job = definitions.resolve_job_def("train_once")
        keys = [key for key in job.asset_layer.executable_asset_keys if set(kinds) & set(key.path)]
        return job.execute_in_process(
            instance=self._instance, raise_on_error=False, asset_selection=keys or None
        )


@pytest.fixture
def project(tmp_path: Path, tiny_qwen: Path) -> Iterator[Project]:
    (tmp_path / "home").mkdir()
    with dg.instance_for_test(temp_dir=str(tmp_path / "home")) as instance:
        yield Project(tmp_path, tiny_qwen, instance)


def message_of(result: dg.ExecuteInProcessResult, kind: str) -> str:
    (event,) = (e for e in result.all_events if e.is_step_failure and kind in (e.step_key or ""))
    failure = event.step_failure_data.user_failure_data
    assert failure is not None
    return failure.description or ""


def test_a_job_makes_and_checks_its_data_once(project: Project) -> None:
    result = project.run()
    assert result.success
    assert (project.data.parent / CALLS).read_text() == "called\n"
    (event,) = (
        e
        for e in result.all_events
        if e.is_step_materialization and "metadata" in e.asset_key.path  # pyright: ignore
    )
    shown = event.step_materialization_data.materialization.metadata
    table = pl.read_parquet(str(shown["table"].value))
    assert shown["dagster/row_count"].value == table.height == 6
    manifest = read_manifest(project.run_folder)
    assert manifest.frame["row"].to_list() == table["row"].to_list()
    assert manifest.samples == 6


def test_a_picture_exchanged_between_two_assets_stops_the_run(project: Project) -> None:
    assert project.run("metadata").success
    picture = project.data / "3.png"
    repaint(picture, "red")
    result = project.run("latents")
    assert not result.success
    message = message_of(result, "latents")
    assert "no longer the one that was checked" in message
    assert f"row 4 of the metadata, image: {picture}" in message
    assert "Traceback" not in message
    assert not (project.run_folder / "samples.parquet").exists()
    planned = pl.read_parquet(project.run_folder / ".samples.planned.parquet")
    lost = planned.filter(pl.col("row") == 4)["key:image"].item()
    stored = set(Store(project.store).index()["key"])
    assert lost not in stored
    # Once it is checked, the new picture has a key of its own.
    assert project.run("metadata", "latents").success
    assert lost not in keys_of(project.run_folder)
    assert keys_of(project.run_folder) <= set(Store(project.store).index()["key"])


def test_a_file_that_was_only_touched_is_the_same(project: Project) -> None:
    assert project.run("metadata").success
    for picture in project.data.glob("*.png"):
        os.utime(picture, (1, 1))
    assert project.run("latents").success


def test_a_checked_table_is_taken_as_it_is(
    values: Values, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also on the command line: nothing is checked again, and other sizes are refused."""
    data = write_images(tmp_path / "data", 4)
    own: dict[str, Any] = {"dataset_base_path": str(data), "cache_path": str(tmp_path / "store")}
    table = str(data / "metadata.csv")
    config = values(**own, dataset_metadata_path=table, max_pixels=256)
    assert train(config, tmp_path / "one", "--task", "sft:data_process")[0] == 0
    checked = str(tmp_path / "one" / "metadata.parquet")
    (data / "metadata.csv").unlink()
    again = values(**own, dataset_metadata_path=checked)
    assert train(again, tmp_path / "two")[0] == 0
    assert read_manifest(tmp_path / "two").digest == read_manifest(tmp_path / "one").digest
    for run in ("one", "two"):
        assert read_checked(tmp_path / run).parameters["max_pixels"] == 256
    capsys.readouterr()
    other = values(**own, dataset_metadata_path=checked, max_pixels=1024)
    assert train(other, tmp_path / "three")[0] == 2
    assert "the table was checked with max_pixels = 256, not 1024" in capsys.readouterr().err


def test_what_an_older_version_encoded_is_recognised(
    values: Values, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = tmp_path / "store"
    config = values(cache_path=str(store))
    assert train(config, tmp_path / "old", "--task", "sft:data_process")[0] == 0
    for file in (store / "index").iterdir():
        pl.read_parquet(file).write_parquet(file)
    manifest = tmp_path / "old" / "samples.parquet"
    notes = pl.read_parquet_metadata(manifest)["diffsynth_dagster"].replace(
        '"layout": 4', '"layout": 3'
    )
    pl.read_parquet(manifest).write_parquet(manifest, metadata={"diffsynth_dagster": notes})
    capsys.readouterr()
    assert maintain(["verify", "--cache_path", str(store)]) == 0
    assert "of an older version" in capsys.readouterr().out
    second = values(cache_path=str(store), dataset_metadata_path=None)
    second["dataset_base_path"] = str(tmp_path / "old")
    assert train(second, tmp_path / "run", "--task", "sft:train")[0] == 2
    assert "encode it again" in capsys.readouterr().err
    assert maintain(["gc", "--cache_path", str(store)]) == 0
    assert Store(store).index().height == 0
