"""Rows that samples are made from: which are taken, of the first half of split training or anew."""

from pathlib import Path
from typing import Any

import polars as pl
import pytest
from conftest import Values, make_config, record_of, train, train_to_end, why_refused
from test_resume import stop_after

from diffsynth_dagster.cache.held_out import left_out_digest
from diffsynth_dagster.cache.layout import SAMPLES_FOLDER
from diffsynth_dagster.cache.manifest import SIGNATURE, read_manifest
from diffsynth_dagster.errors import Stopped
from diffsynth_dagster.train import run as run_training

SAMPLES = {"sample_num_inference_steps": 1, "sample_cfg_scale": 1.0, "height": 32, "width": 32}
FIRST = {**SAMPLES, "task": "sft:data_process"}


def second_half(given: dict[str, Any], encoded: Path, **more: Any) -> dict[str, Any]:
    """The training on a data set that was encoded before, without the text encoder."""
    models = [given["model_paths"][0], given["model_paths"][2]]
    values = {**given, **SAMPLES, "model_paths": models, "dataset_base_path": str(encoded)}
    del values["dataset_metadata_path"]
    return {**values, "task": "sft:train", **more}


def prompts_of(run: Path) -> list[str]:
    return [each["prompt"] for each in record_of(run).shown]


@pytest.fixture(scope="module")
def two(shared_values: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set that was encoded with two prompts."""
    given = {**shared_values, **FIRST, "sample_prompts": ["a", "b"]}
    return train_to_end(given, tmp_path_factory.mktemp("two") / "run")


def test_fewer_prompts_of_the_first_half_need_no_text_encoder(
    values: Values, two: Path, tmp_path: Path
) -> None:
    for number, prompts in enumerate((["b"], ["b", "a"])):
        given = second_half(values(), two, sample_prompts=prompts)
        assert prompts_of(train_to_end(given, tmp_path / f"run{number}")) == prompts
    assert prompts_of(train_to_end(second_half(values(), two), tmp_path / "none")) == []
    both = second_half(values(), two, sample_prompts=["a", "b"])
    assert prompts_of(train_to_end(both, tmp_path / "both")) == ["a", "b"]
    assert not (tmp_path / "both" / SAMPLES_FOLDER).exists()  # those of the first half


def test_a_table_that_is_gone_is_not_taken_for_prompts(
    values: Values, two: Path, tmp_path: Path
) -> None:
    given = second_half(values(), two, sample_table=str(tmp_path / "gone.csv"))
    assert "without a table of samples" in why_refused(given, tmp_path / "run")


def test_samples_of_another_data_set_in_the_run_folder_are_made_anew(
    values: Values, tmp_path: Path
) -> None:
    """Of the second half, whose data set had none."""
    for side in (32, 64):
        size = {"height": side, "width": side}
        encoded = train_to_end(values(**{**FIRST, **size}), tmp_path / f"encoded{side}")
        given = second_half(values(), encoded, **size, sample_prompts=["a"], resume="never")
        given["model_paths"] = values()["model_paths"]
        run = train_to_end(given, tmp_path / "second")
        assert read_manifest(run / SAMPLES_FOLDER).frame["width"].to_list() == [side]
        assert record_of(run).shown[0]["box"] == [0, 0, side, side]


def test_samples_whose_encoding_was_stopped_are_not_taken_for_others(
    values: Values, tmp_path: Path
) -> None:
    """The first half with other prompts, stopped before their samples were encoded."""
    encoded = train_to_end(values(**FIRST, sample_prompts=["a", "b"]), tmp_path / "encoded")
    other = {**values(**FIRST, sample_prompts=["c"]), "output_path": str(encoded)}
    with pytest.raises(Stopped):
        run_training(make_config(other), lambda: True)
    given = second_half(values(), encoded, sample_prompts=["a", "b"])
    assert "encoded without samples" in why_refused(given, tmp_path / "run")
    given["model_paths"] = values()["model_paths"]
    assert prompts_of(train_to_end(given, tmp_path / "run")) == ["a", "b"]


def test_a_dry_run_goes_on_with_a_training_that_has_a_table_of_samples(
    values: Values, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = tmp_path / "samples.csv"
    table.write_text("prompt\na picture\n")
    given = values(
        **SAMPLES, sample_table=str(table), num_epochs=2, output_path=str(tmp_path / "r")
    )
    stop_after(given, 1)
    assert train({**given, "resume": "must"}, tmp_path / "r", "--dry_run")[0] == 0
    capsys.readouterr()


def test_near_copies_that_are_found_later_make_it_another_training(
    values: Values, tmp_path: Path
) -> None:
    """The same rows in the same manifest, of which some are left out now."""
    config = values(validation_split=2, task="sft:data_process")
    run = train_to_end(config, tmp_path / "run")
    manifest = read_manifest(run)
    given = make_config({**config, "output_path": str(run)})
    assert left_out_digest(given, manifest) is None
    rows = manifest.frame
    alike = rows.with_columns(pl.lit(rows[SIGNATURE][0]).alias(SIGNATURE))
    alike.write_parquet(manifest.path)
    assert left_out_digest(given, manifest) is not None
