"""What a dry run says of names and files that are not there."""

from pathlib import Path

import pytest
import yaml
from conftest import Values, train_to_end, why_refused

from diffsynth_dagster.config import TrainingConfig
from diffsynth_dagster.config.recipe import RecipeOptions
from diffsynth_dagster.errors import ParameterError
from diffsynth_dagster.families import family_names
from diffsynth_dagster.train import main
from resources import Launcher
from resources.recipes import load_recipes

GONE = "/nowhere/diffusion_pytorch_model.safetensors"


@pytest.mark.parametrize("family", family_names())
@pytest.mark.parametrize("more", [(), ("--align_to_opensource_format",)])
def test_a_model_that_the_family_lacks_is_named_first(
    values: Values,
    tmp_path: Path,
    family: str,
    more: tuple[str, ...],
) -> None:
    """Whatever else the name would be wrong for."""
    given = values(family=family, lora_base_model="vaee", model_paths=[GONE], tokenizer_path=None)
    error = why_refused(given, tmp_path / "run", "--dry_run", *more)
    assert f"{family} has no model 'vaee'; did you mean 'vae'?" in error
    assert "lora_base_model" in error


@pytest.mark.parametrize("index", [0, 1, 2])
def test_a_file_that_is_not_there_is_named(values: Values, tmp_path: Path, index: int) -> None:
    given = values()
    files = list(given["model_paths"])
    files[index] = GONE
    for paths in (files, [*given["model_paths"][:index], [given["model_paths"][index], GONE]]):
        error = why_refused({**given, "model_paths": paths}, tmp_path / "run", "--dry_run")
        assert "the model file does not exist" in error
        assert f"model_paths = {GONE}" in error


@pytest.mark.parametrize("name", ["lora_checkpoint", "preset_lora_path"])
def test_a_lora_that_is_not_there_is_named(values: Values, tmp_path: Path, name: str) -> None:
    assert f"{name} = {GONE}" in why_refused(values(**{name: GONE}), tmp_path / "run", "--dry_run")


def test_a_tokenizer_that_is_not_there_is_named(values: Values, tmp_path: Path) -> None:
    given = values(tokenizer_path="/nowhere/tokenizer")
    assert "tokenizer_path = /nowhere/tokenizer" in why_refused(
        given, tmp_path / "run", "--dry_run"
    )


def test_a_plan_for_another_machine_needs_no_file(values: Values, tmp_path: Path) -> None:
    given = values(model_paths=[GONE, "/nowhere/vae/*.safetensors"], tokenizer_path="/nowhere/t")
    given |= {"dataset_base_path": "/nowhere", "dataset_metadata_path": "/nowhere/metadata.csv"}
    train_to_end(given, tmp_path / "run", "--dry_run", "--no_files")


def test_a_plan_with_all_files_is_made(values: Values, tmp_path: Path) -> None:
    given = values()
    given["model_paths"] = [f"{Path(p).parent!s}/*.safetensors" for p in given["model_paths"]]
    train_to_end(given, tmp_path / "run", "--dry_run")


@pytest.mark.parametrize(
    ("name", "flags"),
    [
        ("dataset_base_path", ()),
        ("dataset_metadata_path", ()),
        ("model_paths", ("--dry_run",)),
        ("tokenizer_path", ("--dry_run",)),
        ("lora_checkpoint", ("--dry_run",)),
        ("preset_lora_path", ("--dry_run",)),
        ("lora_checkpoint", ()),
        ("preset_lora_path", ()),
    ],
)
def test_where_a_relative_path_leads_is_said(
    values: Values,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    flags: tuple[str, ...],
) -> None:
    monkeypatch.chdir(tmp_path)
    gone = "gone/file.csv" if name == "dataset_metadata_path" else "gone/file.safetensors"
    given = values(**{name: [gone, *values()["model_paths"]] if name == "model_paths" else gone})
    assert f"{name} = {tmp_path / gone}\n" in why_refused(given, tmp_path / "run", *flags)


def test_where_a_recipe_was_looked_for_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["--recipe", "gone.yaml"]) == 2
    assert f"where: {tmp_path / 'gone.yaml'}\n" in capsys.readouterr().err
    with pytest.raises(ParameterError, match=str(tmp_path / "recipes")):
        load_recipes(Path("recipes"))
    options = RecipeOptions(accelerate_config="gone.yaml")
    with pytest.raises(ParameterError, match=f"accelerate_config = {tmp_path / 'gone.yaml'}"):
        Launcher()._launch(TrainingConfig(), options, [])


@pytest.mark.parametrize("name", ["dataset_metadata_path", "dataset_base_path"])
def test_data_that_is_not_there_is_named_and_nothing_is_made(
    values: Values, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    places = {"cache_path": str(tmp_path / "cache"), "output_path": str(tmp_path / "run")}
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({**values(), **places, name: "none.csv"}))
    assert main(["--recipe", str(recipe)]) == 2
    assert f"{name} = {Path('none.csv').absolute()}" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [recipe]
