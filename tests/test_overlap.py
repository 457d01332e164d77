"""Nothing that a training writes takes the place of what it reads, or of what is not the project's."""

import json
import os
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import dagster as dg
import polars as pl
import pytest
import yaml
from conftest import Values, make_config, why_refused
from dagster_support import definitions_of, failure_of, write_recipe

from diffsynth_dagster.cache.__main__ import main as maintain
from diffsynth_dagster.config import TrainingConfig
from diffsynth_dagster.config.recipe import dump_config
from diffsynth_dagster.data.table.checked_table import write_checked
from diffsynth_dagster.data.table.validate import CheckedTable
from diffsynth_dagster.dry_run import make_plan
from diffsynth_dagster.errors import ParameterError
from diffsynth_dagster.files import hidden_beside, remove_leftovers
from diffsynth_dagster.older import older_runs
from diffsynth_dagster.run.record import RunFile, RunRecord
from diffsynth_dagster.train import main
from diffsynth_dagster.training.overlap import (
    refuse_overlap,
    refuse_own_recipe,
    refuse_replaced_rows,
)
from diffsynth_dagster.training.resume import make_ready

RECORD = RunRecord("i", "qwen_image", ["dit"], {}, 1, "s", "c", None)


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Paths are relative to a folder with a run folder `run` and a data set `data`."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DIFFSYNTH_MODEL_BASE_PATH", raising=False)
    Path("run").mkdir()
    Path("data").mkdir()


def config_of(**given: Any) -> TrainingConfig:
    """A training on `data` in `run`; keywords override it."""
    values = {
        "dataset_base_path": "data",
        "dataset_metadata_path": "data/t.csv",
        "output_path": "run",
        "cache_path": "cache",
        "model_paths": ["model"],
        **({} if "trainable_models" in given else {"lora_base_model": "dit"}),
        **given,
    }
    return make_config({name: value for name, value in values.items() if value is not None})


def refusal(**given: Any) -> str:
    """What is said of parameters; nothing where they are taken."""
    try:
        refuse_overlap(config_of(**given))
    except ParameterError as error:
        return f"{error.what} @ {error.where}"
    return ""


def write_record(folder: str, **facts: Any) -> None:
    """Leave the record of an earlier training."""
    file = RunFile(Path(folder), RunRecord(**{**asdict(RECORD), **facts}), writes=True)
    file.begin(total_steps=1)


FULL = {"trainable_models": "dit"}


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ({"model_paths": ["run/epoch-0.safetensors"]}, "epoch-0.safetensors"),
        ({"model_paths": [["a", "run/epoch-0-dit2.safetensors"]]}, "epoch-0-dit2.safetensors"),
        ({"model_paths": ["run/step-7.safetensors"], "save_steps": 5}, "step-7.safetensors"),
        ({"lora_checkpoint": "run/epoch-1.safetensors", "num_epochs": 2}, "epoch-1.safetensors"),
        ({"preset_lora_path": "data/../run/epoch-0.safetensors"}, "epoch-0.safetensors"),
        ({"resume_from_checkpoint": "run/epoch-0.safetensors", **FULL}, "epoch-0.safetensors"),
        (
            {
                "lora_checkpoint": "run/best-step-3.safetensors",
                "validation_split": 0.5,
                "keep_best": True,
            },
            "best-step-3.safetensors",
        ),
        (
            {
                "lora_checkpoint": "run/step-3.safetensors",
                "validation_split": 0.5,
                "early_stopping_patience": 2,
            },
            "step-3.safetensors",
        ),
        (
            {"lora_checkpoint": "run/exports/diffusers/pytorch_lora_weights.safetensors"},
            "exports/diffusers/pytorch_lora_weights.safetensors",
        ),
        ({"tokenizer_path": "run/state/step-3/tokenizer"}, "state/step-3/tokenizer"),
        ({"dataset_metadata_path": "run/metadata.parquet"}, "metadata.parquet"),
        ({"dataset_metadata_path": "run/rejected.csv"}, "rejected.csv"),
        ({"dataset_metadata_path": "run/held_out/metadata.parquet"}, "held_out/metadata.parquet"),
        ({"validation_metadata_path": "run/samples.parquet"}, "samples.parquet"),
        ({"sample_table": "run/metrics.csv"}, "metrics.csv"),
    ],
)
def test_an_input_with_the_name_of_an_output_is_refused(given: dict[str, Any], name: str) -> None:
    said = refusal(**given)
    assert f"replaced, moved or removed by what is written: '{name}' of the run folder" in said
    assert f"{next(iter(given))} = " in said
    assert said.endswith("output_path = run")
    assert refusal(**given, output_path="elsewhere") == ""


@pytest.mark.parametrize(
    "given",
    [
        {"output_path": "data/run"},
        {"output_path": "."},  # the folder that holds data, cache and models
        {"cache_path": "run/cache"},
        {"cache_path": "run/samples"},
        {"dataset_base_path": "run/data", "dataset_metadata_path": "run/data/metadata.parquet"},
        {"dataset_base_path": "run/held_out", "dataset_metadata_path": "run/held_out/t.csv"},
        {"dataset_metadata_path": "run/t.parquet"},
        {"dataset_base_path": "run", "dataset_metadata_path": None, "task": "sft:train"},
        {"model_paths": ["run/step-7.safetensors"]},
        {"model_paths": ["run/model.safetensors"], "save_steps": 5},
        {"lora_checkpoint": "run/epoch-5.safetensors", "num_epochs": 5},
        {"lora_checkpoint": "run/best-step-5.safetensors"},
        {"lora_checkpoint": "run/epoch-0.safetensors", "task": "sft:data_process"},
        {"sample_table": "run/samples/mine.csv"},
        {"sample_prompts": ["run/metrics.csv", "two prompts"]},
    ],
)
def test_what_is_not_replaced_is_taken(given: dict[str, Any]) -> None:
    assert refusal(**given) == ""


def test_folders_and_patterns_of_models_are_looked_into(monkeypatch: pytest.MonkeyPatch) -> None:
    assert refusal(model_paths=["run"]) == refusal(model_paths=["run/e*.safetensors"]) == ""
    Path("run/epoch-0.safetensors").touch()
    assert "'epoch-0.safetensors'" in refusal(model_paths=["run"])
    assert "'epoch-0.safetensors'" in refusal(model_paths=["run/e*.safetensors"])
    hub = {"model_id_with_origin_paths": "owner/name:epoch*"}
    shutil.copytree("run", "hub/owner/name")
    monkeypatch.setenv("DIFFSYNTH_MODEL_BASE_PATH", "hub")
    assert refusal(**hub) == ""
    assert "'epoch-0.safetensors'" in refusal(**hub, output_path="hub/owner/name")


def test_links_are_followed() -> None:
    os.symlink("run", "linked")
    os.symlink("run/epoch-0.safetensors", "base.safetensors")
    os.symlink("../data/base.safetensors", "run/epoch-1.safetensors")
    for path in ("linked/epoch-0.safetensors", "base.safetensors"):
        assert "'epoch-0.safetensors'" in refusal(model_paths=[path])
    assert "'epoch-0.safetensors'" in refusal(
        model_paths=["run/epoch-0.safetensors"], output_path="linked"
    )
    within = {"max_train_steps": 3}
    assert "'epoch-2.safetensors'" in refusal(lora_checkpoint="run/epoch-2.safetensors", **within)
    assert "'step-3.safetensors'" in refusal(lora_checkpoint="run/step-3.safetensors", **within)
    assert refusal(lora_checkpoint="run/step-2.safetensors", **within) == ""
    # The link in the run folder would be replaced, and not what it leads to.
    of_two = {"num_epochs": 2}
    assert "'epoch-1.safetensors'" in refusal(model_paths=["run/epoch-1.safetensors"], **of_two)
    assert refusal(model_paths=["data/base.safetensors"], **of_two) == ""
    assert "that of the data set" in refusal(dataset_base_path="linked", output_path="run")
    assert "in a store" in refusal(cache_path="linked", output_path="run/new")


def test_a_checked_table_may_be_given_to_its_own_run_folder() -> None:
    for folder, parameter in (("run", "dataset"), ("run/held_out", "validation")):
        named = {f"{parameter}_metadata_path": f"{folder}/metadata.parquet"}
        assert "metadata.parquet" in refusal(**named)
        rows = pl.LazyFrame({"row": [1], "status": ["ok"], "message": [""]})
        write_checked(CheckedTable(rows, "data/t.csv"), Path(folder))
        assert refusal(**named) == ""
    other = {"validation_metadata_path": "run/metadata.parquet"}
    assert "'metadata.parquet'" in refusal(**other), "it becomes that of the data set"


def test_what_an_earlier_training_left_and_this_one_moves_is_refused() -> None:
    start = {"lora_checkpoint": "run/epoch-3.safetensors"}
    assert refusal(**start) == ""
    write_record("run", checkpoints={"epoch-3.safetensors": "d"})
    assert "'epoch-3.safetensors'" in refusal(**start)
    assert refusal(lora_checkpoint="run/epoch-4.safetensors") == ""
    Path("run/run.json").write_text("damaged: all that has such a name is moved")
    assert refusal(**start) == ""  # it is not there
    Path("run/epoch-3.safetensors").touch()
    assert "'epoch-3.safetensors'" in refusal(**start)


def test_a_checkpoint_of_an_older_training_is_taken_where_none_is_removed() -> None:
    start = {"lora_checkpoint": "run/older/2026-11-30T01-52-07/epoch-0.safetensors"}
    assert refusal(**start) == ""
    assert "older/2026-11-30T01-52-07/epoch-0" in refusal(**start, runs_keep=1)
    assert refusal(**start, runs_keep=1, task="sft:data_process") == ""


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"dataset_base_path": "run"}, "the run folder is that of the data set"),
        ({"dataset_base_path": ".", "output_path": "."}, "the run folder is that of the data set"),
        ({"cache_path": "run"}, "the run folder lies in a store"),
        ({"cache_path": "cache", "output_path": "cache/new/run"}, "the run folder lies in a store"),
        ({"output_path": "old/shards"}, "the run folder lies in a store"),
        ({"cache_path": "run/.prompts/cache"}, "'.prompts/cache' of the run folder is replaced"),
        ({"dataset_base_path": "run/exports/peft"}, "'exports/peft' of the run folder is replaced"),
    ],
)
def test_folders_inside_each_other_are_refused(given: dict[str, Any], words: str) -> None:
    for name in ("index", "shards"):
        Path("old", name).mkdir(parents=True)
    assert words in refusal(**given)


@pytest.mark.parametrize("many", [False, True])
def test_rows_with_samples_of_the_training_before_are_refused(many: bool) -> None:
    run = str(Path("run").absolute())
    names = ["samples/step-2.png", "samples/mine.png", "mine/step-2.png", "epoch-9.safetensors"]
    paths = [f"{run}/{name}" for name in names] + ["/elsewhere/run/samples/step-2.png", None]
    config = config_of()

    def refused(paths: list[str | None]) -> None:
        values = [None if p is None else [p] for p in paths] if many else paths
        kind = pl.List(pl.String) if many else pl.String
        rows = pl.LazyFrame({"image:path": values}, schema={"image:path": kind})
        refuse_replaced_rows(config, [CheckedTable(rows, "data/t.csv")])

    with pytest.raises(ParameterError, match=r"samples/step-2\.png"):
        refused(paths)
    refused(paths[1:])


def test_a_recipe_is_not_written_over() -> None:
    config = config_of()
    recipe = Path("run/config.yaml")
    recipe.write_text(dump_config(config))
    refuse_own_recipe(config, recipe)  # as a training wrote it
    for text in ("# mine\noutput_path: run\n", "output_path: run\ndescription: mine\n"):
        recipe.write_text(text)
        refuse_own_recipe(config, recipe.rename("recipe.yaml"))
        Path("recipe.yaml").rename(recipe)
        with pytest.raises(ParameterError, match=r"config\.yaml"):
            refuse_own_recipe(config, recipe)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def step_failure(kind: str, **given: Any) -> str:
    """How the asset of a recipe fails."""
    write_recipe(Path("recipes"), "own", given)
    job = definitions_of(Path("recipes")).resolve_job_def("train_own")
    key = dg.AssetKey(["own", kind])
    result = job.execute_in_process(raise_on_error=False, asset_selection=[key])
    return failure_of(result, f"own__{kind}")


def test_trainer_dry_run_and_dagster_refuse_before_they_write(
    values: Values, tmp_path: Path, pictures: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "set"
    shutil.copytree(pictures, data)
    given = values(
        dataset_base_path=str(data),
        dataset_metadata_path=str(data / "metadata.csv"),
        output_path=str(data),
        cache_path=str(tmp_path / "cache"),
    )
    before, words = contents(data), "the run folder is that of the data set"
    assert words in why_refused(given, data)
    with pytest.raises(ParameterError, match=words):
        make_plan(make_config(given))
    assert words in step_failure("metadata", **given)
    assert contents(data) == before
    assert not (tmp_path / "cache").exists()

    given["output_path"] = "run"
    write_record("run", checkpoints={"epoch-0.safetensors": "d"}, finished=True)
    start = {"lora_checkpoint": "run/epoch-0.safetensors"}
    assert "'epoch-0.safetensors' of the run folder" in step_failure("exports", **given, **start)

    Path("run/config.yaml").write_text("# mine\n" + yaml.safe_dump(given))
    for flags in ([], ["--dry_run"]):
        assert main(["--recipe", "run/config.yaml", *flags]) == 2
        assert "'config.yaml' of the run folder" in capsys.readouterr().err


def test_cleaning_up_a_store_leaves_what_is_not_its_own(
    capsys: pytest.CaptureFixture[str],
) -> None:
    store = Path("store")
    mine = ["shards/00001.tar", "shards/a/b.png", "index/mine.parquet", "users/.DS_Store"]
    for name in mine:
        path = store / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("mine")
    before = contents(store)
    shard = store / "shards" / f"{'0' * 32}.safetensors"
    staged = [hidden_beside(shard), hidden_beside(store / "index" / "x.parquet")]
    staged[0].write_text("half")
    staged[1].mkdir()
    shard.write_text("without an index")
    assert maintain(["stats", "--cache_path", "store"]) == 0
    assert "files that nothing names: 3" in capsys.readouterr().out
    for command in (["verify", "--drop"], ["gc"]):
        assert maintain([*command, "--cache_path", "store"]) == 0
    after = contents(store)
    del after["lock"]  # says who cleaned up
    assert after == before


def test_only_files_of_an_earlier_training_are_moved() -> None:
    own = ["epoch-0.safetensors", "samples/step-1.png", "samples/before-eights.png"]
    mine = ["model.safetensors", "samples/cat.png", "notes.txt", "state/mine/x", ".cache/x"]
    mine += [".x.12345678-1", "step-best.safetensors"]
    for name in own + mine:
        path = Path("run", name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
        os.utime(path.parent, (0, 0))
        os.utime(path, (0, 0))
    write_record(
        "run",
        checkpoints=dict.fromkeys(["model.safetensors", "epoch-0.safetensors"], "d"),
        writing=["../run/notes.txt", "step-best.safetensors"],
        pictures={"a": "cat.png", "b": "step-1.png", "c": "before-eights.png"},
    )
    assert json.loads(Path("run/run.json").read_text())["checkpoints"]
    make_ready(Path("run"), None, warn=lambda text: None)
    remove_leftovers(Path("run"))
    (older,) = older_runs(Path("run"))
    moved = [str((older / name).relative_to("run")) for name in [*own, "run.json"]]
    assert sorted(contents(Path("run"))) == sorted([*mine, *moved])
