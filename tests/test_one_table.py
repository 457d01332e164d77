"""The data set is made once, checked once, and what was checked is what is encoded and trained."""

import os
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import dagster as dg
import polars as pl
import pytest
from conftest import (
    Values,
    keys_of,
    lora_values,
    make_config,
    train_to_end,
    why_refused,
    write_images,
)
from dagster_support import definitions_of, write_recipe
from PIL import Image
from process_support import forked_launches

from diffsynth_dagster.cache.__main__ import main as maintain
from diffsynth_dagster.cache.encoded_for import require_encoded_for
from diffsynth_dagster.cache.keys import sample_identity, with_contents
from diffsynth_dagster.cache.manifest import read_manifest
from diffsynth_dagster.cache.store import Store
from diffsynth_dagster.data.prepare import prepare_data
from diffsynth_dagster.data.table.checked_table import PINNED, pin, read_checked
from diffsynth_dagster.errors import ParameterError
from diffsynth_dagster.facts import FactCache
from diffsynth_dagster.families import find_family
from diffsynth_dagster.weights.hub import ModelHub
from diffsynth_dagster.weights.identify import find_model

CALLS = "calls.txt"


def make_and_count(folder: Path) -> None:
    """A `customized_dataset` that makes other pictures at each call, and notes that it was called."""
    calls = folder.parent / CALLS
    count = len(calls.read_text().splitlines()) if calls.exists() else 0
    if not folder.is_dir():
        write_images(folder, 6)
    for index, picture in enumerate(sorted(folder.glob("*.png"))):
        repaint(picture, (40 * index, 40 * count, 0))
    with calls.open("a") as file:
        file.write("called\n")


def repaint(path: Path, colour: str | tuple[int, int, int]) -> None:
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
        self.give()

    def give(self, **more: object) -> None:
        """Write the recipe with further parameters."""
        write_recipe(self._folder / "recipes", "once", {**self.values, **more})

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
    home = str(tmp_path / "home")
    with forked_launches(), dg.instance_for_test(temp_dir=home) as instance:
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
    inputs = find_family("qwen_image").columns.inputs
    identities = with_contents(table, inputs).select(sample_identity(inputs)).to_series()
    assert len(set(identities)) == 6
    assert manifest.frame["sample"].to_list() == [f"{identity}-1" for identity in identities]


@pytest.mark.soak  # `test_exchanged_files.py` has it without Dagster
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


@pytest.mark.soak
def test_latents_alone_go_on_with_their_own_data_set_only(project: Project) -> None:
    """Nor with other parameters, also where the recipe leaves out now what it gave before."""
    project.give(max_pixels=512)
    assert project.run("metadata", "latents").success
    project.give()
    for kind, what in (("latents", "table was checked"), ("checkpoints", "data set was encoded")):
        message = message_of(project.run(kind), kind)
        assert f"the {what} with max_pixels = 512, and now it is 1048576" in message
        assert "materialize the" in message
    project.give(max_pixels=512, dataset_metadata_path=str(project.data / "other.csv"))
    for kind in ("latents", "checkpoints"):
        assert "with dataset_metadata_path = " in message_of(project.run(kind), kind)
    project.give(max_pixels=512)
    assert project.run("checkpoints").success
    (project.run_folder / "samples.parquet").unlink()
    assert project.run("exports").success


def test_a_table_that_is_encoded_stays_what_it_is(project: Project) -> None:
    assert project.run("metadata").success
    first = read_checked(project.run_folder)
    before = first.frame
    pin(project.run_folder)
    assert project.run("metadata").success  # which paints other pictures
    assert not read_checked(project.run_folder).frame.equals(before)
    assert read_checked(project.run_folder, PINNED).frame.equals(before)


def test_who_owns_the_folder_goes_on_with_what_it_checked(values: Values, tmp_path: Path) -> None:
    """Whatever someone else checks into the same folder between two of its steps."""
    columns = find_family("qwen_image").columns
    mine, data = make_config(values()), write_images(tmp_path / "data", 3)
    other = values(dataset_base_path=str(data), dataset_metadata_path=str(data / "metadata.csv"))
    run = Path(mine.output_path)
    with closing(FactCache(tmp_path / "facts.sqlite")) as cache:
        checked = prepare_data(mine, columns, cache, pinned=True).frame
        assert prepare_data(make_config(other), columns, cache).frame.height == 3
    assert read_checked(run).frame.height == 3
    assert read_checked(run, PINNED).frame.equals(checked)
    assert checked.height == 8


def test_a_table_of_other_columns_or_an_older_stage_is_refused(
    values: Values, tmp_path: Path
) -> None:
    config = values(cache_path=str(tmp_path / "store"))
    train_to_end(config, tmp_path / "one", "--task", "sft:data_process")
    family = find_family("qwen_image")
    config = make_config(
        {**config, "dataset_metadata_path": str(tmp_path / "one/metadata.parquet")}
    )
    other = replace(family.columns, geometry=replace(family.geometry, side_factor=32))
    cache = FactCache(tmp_path / "facts.sqlite")
    with pytest.raises(ParameterError, match="checked for other columns or sizes"):
        prepare_data(config, other, cache)
    found = find_model(config, ModelHub.from_environment())
    raised = tuple(replace(stage, version=stage.version + 1) for stage in found.family.stages)
    newer = replace(found, family=replace(found.family, stages=raised))
    manifest = read_manifest(tmp_path / "one")
    require_encoded_for(config, found, manifest, cache)
    with pytest.raises(ParameterError, match="another version of the stage"):
        require_encoded_for(config, newer, manifest, cache)


def test_the_data_sets_own_table_is_not_replaced(values: Values, tmp_path: Path) -> None:
    data = write_images(tmp_path / "run", 2)
    table = data / "metadata.parquet"
    pl.read_csv(data / "metadata.csv").write_parquet(table)
    before = table.read_bytes()
    config = values(dataset_base_path=str(tmp_path), dataset_metadata_path=str(table))
    assert "by what is written: 'metadata.parquet' of the run folder" in why_refused(
        config, tmp_path / "run"
    )
    assert table.read_bytes() == before


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
    train_to_end(config, tmp_path / "one", "--task", "sft:data_process")
    checked = str(tmp_path / "one" / "metadata.parquet")
    (data / "metadata.csv").unlink()
    again = values(**own, dataset_metadata_path=checked)
    train_to_end(again, tmp_path / "two")
    assert read_manifest(tmp_path / "two").digest == read_manifest(tmp_path / "one").digest
    for run in ("one", "two"):
        assert read_checked(tmp_path / run).parameters["max_pixels"] == 256
    capsys.readouterr()
    other = values(**own, dataset_metadata_path=checked, max_pixels=1024)
    assert "was checked with max_pixels = 256, and now it is 1024" in why_refused(
        other, tmp_path / "three"
    )


def test_what_an_older_version_encoded_is_recognised(
    values: Values, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = tmp_path / "store"
    config = values(cache_path=str(store))
    train_to_end(config, tmp_path / "old", "--task", "sft:data_process")
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
    assert "encode it again" in why_refused(second, tmp_path / "run", "--task", "sft:train")
    assert maintain(["gc", "--cache_path", str(store)]) == 0
    assert Store(store).index().height == 0
