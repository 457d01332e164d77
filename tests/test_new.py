"""`python -m diffsynth_dagster.new`: a recipe for one's own data set, or nothing."""

import shutil
from pathlib import Path

import pytest
from conftest import ROOT, model_files, write_images

from diffsynth_dagster.config import read_recipe
from diffsynth_dagster.config.recipe import read_values
from diffsynth_dagster.families import family_names
from diffsynth_dagster.new.__main__ import main
from diffsynth_dagster.new.data import Data, Found
from diffsynth_dagster.new.recipe import (
    Asked,
    changed,
    choices_of,
    config_of,
    course_of,
    settings_of,
)
from diffsynth_dagster.new.template import PLAIN, edited, templates
from diffsynth_dagster.preflight import check_config
from diffsynth_dagster.weights.identify import guess_model
from resources import load_recipes


def captioned(folder: Path, count: int, sizes: list[tuple[int, int]] | None = None) -> Path:
    """A folder of pictures, each with its caption beside it."""
    write_images(folder, count, sizes)
    (folder / "metadata.csv").unlink()
    for number in range(count):
        text = f"a cat: number {number}\non a sofa, asleep\n"
        (folder / f"{number}.txt").write_text(text, encoding="utf-8")
    return folder


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty project in which the commands are given, with a data set of twelve pictures."""
    root = tmp_path / "project"
    captioned(root / "data" / "cats", 12, [(48, 32), (32, 32)])
    monkeypatch.chdir(root)
    monkeypatch.setenv("DIFFSYNTH_DAGSTER_RECIPES", "recipes")
    return root


def left(root: Path) -> set[str]:
    """All files of a project but its data, from its root, and all folders that are empty."""
    paths = (p for p in root.rglob("*") if p.is_file() or not any(p.iterdir()))
    return {p.relative_to(root).as_posix() for p in paths if p.parts[len(root.parts)] != "data"}


def test_a_recipe_follows_from_the_pictures(
    project: Path, tiny_qwen: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    models = ["--models", *model_files(tiny_qwen)]
    given = ["cats", "--family", "qwen_image", "--data", "data/cats", "--trigger", "ohwx", *models]
    assert main(given) == 0
    said = capsys.readouterr().out
    sound, broken = load_recipes(project / "recipes")
    assert ([r.name for r in sound], broken) == (["cats"], [])
    config = sound[0].config
    assert (config.dataset_base_path, config.output_path) == ("data/cats", "models/train/cats")
    assert config.dataset_metadata_path == "data/cats"
    assert list(config.model_paths) == model_files(tiny_qwen)
    assert (config.max_pixels, config.max_train_steps, config.save_steps) == (48 * 32, 1200, 300)
    assert config.validation_split is None
    assert config.sample_prompts == tuple(
        f"ohwx a cat: number {n} on a sofa, asleep" for n in (0, 4, 9)
    )
    # All else is the template's, with its comments.
    text = (project / "recipes" / "cats.yaml").read_text(encoding="utf-8")
    template = templates()["qwen_image_lora"].read_text(encoding="utf-8")
    for line in template[
        template.index("lora_base_model") : template.index("# How long")
    ].splitlines():
        assert line in text.splitlines()
    assert "dataset_metadata_path" not in text
    assert "# 12 pictures of 32x32 to 48x32 pixels; captions lie in text files beside them." in text
    assert "Copy this file" not in text
    assert "data/cats: 12 of 12 rows are usable" in said
    assert "train_cats" in said
    assert "recipes/cats.yaml --dry_run" in said
    names = {"recipes/cats.yaml", "workspace.yaml", "dagster_home/dagster.yaml"}
    assert left(project) == {*names, "cache/facts.sqlite"}
    for name in ("workspace.yaml", "dagster_home/dagster.yaml"):
        assert (project / name).read_bytes() == (ROOT / name).read_bytes()


def test_what_is_there_stays(project: Path) -> None:
    (project / "workspace.yaml").write_text("load_from: []\n")
    outside = captioned(project.parent / "dogs", 30)
    lines = ["image,prompt", *(f"{n}.png,a dog" for n in range(30))]
    (outside / "table.csv").write_text("\n".join(lines) + "\n")
    assert main(["dogs", "--family", "flux", "--data", str(outside / "table.csv")]) == 0
    assert (project / "workspace.yaml").read_text() == "load_from: []\n"
    config = read_recipe(project / "recipes" / "dogs.yaml").config
    assert config.dataset_base_path == str(outside)
    assert config.dataset_metadata_path == str(outside / "table.csv")
    assert (config.validation_split, config.max_train_steps) == (3, 2000)
    assert config.sample_prompts == ("a dog",)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["no name"], "'no name' is no name of a recipe"),
        (["weights"], "'weights' is no name of a recipe"),
        (["taken"], "there is a recipe of this name: taken.yaml"),
        (["its-folder"], "the recipe 'taken' has the run folder that this one would have"),
        (["a", "--template", "qwen_image_lor"], "did you mean 'qwen_image_lora'"),
        (["a", "--family", "qwen_imag"], "did you mean 'qwen_image'"),
        (["a", "--data", "data/cat"], "there is no such folder or table"),
        (["a", "--data", "data/cats/0.txt"], "neither a folder nor a metadata table"),
        (["a", "--template", "qwen_image_edit_lora"], "also reads edit_image here"),
        (["a", "--data", "data/odd"], "11 of 12 rows are usable; 1 is rejected: 1 no caption file"),
        (["a", "--models", "none.safetensors"], "none.safetensors"),
        (["a", "--data", "data/two"], "the folder holds metadata.csv and metadata.json"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_is_refused_leaves_nothing(
    given: list[str], message: str, project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(project / "data" / "cats", project / "data" / "odd")
    (project / "data" / "odd" / "3.txt").unlink()
    (project / "data" / "two").mkdir()
    for kind in ("csv", "json"):
        (project / "data" / "two" / f"metadata.{kind}").touch()
    text = templates()["qwen_image_lora"].read_text(encoding="utf-8")
    (project / "recipes").mkdir()
    taken = text.replace("models/train/Qwen-Image_lora", "models/train/its-folder")
    (project / "recipes" / "taken.yaml").write_text(taken, encoding="utf-8")
    before = left(project)
    which = [] if "--template" in given or "--family" in given else ["--family", "qwen_image"]
    data = [] if "--data" in given else ["--data", "data/cats"]
    assert main([*given, *which, *data]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "what to do: " in error
    assert left(project) == before


def test_a_file_that_cannot_be_written_leaves_nothing(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (project / "recipes").touch()
    assert main(["a", "--family", "qwen_image", "--data", "data/cats"]) == 2
    assert "recipes" in capsys.readouterr().err
    assert left(project) == {"recipes"}


@pytest.mark.parametrize(
    ("samples", "at_once", "expected"),
    [
        (1, 1, (500, 0, "500")),
        (5, 1, (500, 0, "100")),
        (12, 1, (1200, 0, "100")),
        (20, 1, (2000, 0, "100")),
        (30, 1, (2000, 3, "74")),
        (5000, 1, (2000, 20, "0.4")),
        (100, 8, (1200, 10, "107")),
    ],
)
def test_steps_follow_from_the_number_of_samples(
    samples: int, at_once: int, expected: tuple[int, int, str]
) -> None:
    course = course_of({1: samples}, at_once, 2000)
    assert (course.steps, course.held_out, course.visits) == expected
    assert course.save_steps * 4 == course.steps


def test_steps_follow_from_the_samples_that_are_taken_most_often() -> None:
    course = course_of({1: 10, 10: 5}, 1, 2000)
    assert (course.steps, course.visits) == (600, "10 to 100")


def test_shards_of_a_model_are_one_entry(tmp_path: Path) -> None:
    """A shell hands over each file that a pattern stands for."""
    shards = tuple(str(tmp_path / f"dit-0000{n}-of-00002.safetensors") for n in (1, 2))
    models = (*shards, str(tmp_path / "vae.safetensors"))
    asked = Asked("mine", tmp_path, Data(tmp_path / "my_data", None), models)
    settings = settings_of(asked)
    path = templates()["qwen_image_lora"]
    text = edited(path.read_text(encoding="utf-8"), settings, "Made for a test.", "my_data")
    (tmp_path / "a.yaml").write_text(text, encoding="utf-8")
    values, _ = read_values(tmp_path / "a.yaml")
    assert values["model_paths"] == [[Path(s).name for s in shards], "vae.safetensors"]
    config = config_of(values, tmp_path)
    assert config.model_paths == (shards, models[-1])


def test_a_model_list_that_lacks_a_model_is_refused(
    project: Path, tiny_qwen: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["a", "--family", "qwen_image", "--data", "data/cats", "--models"]
    assert main([*command, *model_files(tiny_qwen)[:1]]) == 2
    assert "the model list lacks the component 'text_encoder'" in capsys.readouterr().err
    assert not (project / "recipes" / "a.yaml").exists()


def test_every_template_takes_a_data_set_of_ones_own(tmp_path: Path) -> None:
    assert set(PLAIN) == set(family_names())
    assert set(PLAIN.values()) <= set(templates())
    asked = Asked("mine", tmp_path, Data(tmp_path / "my_data", None), (), "ohwx")
    prompts = ["a cat: yes", "'x' # y", "[1]\x85 2"]
    found = Found(50, {1: 50}, "pictures", (400, 300), (640, 480), "", [], prompts)
    for name, path in templates().items():
        values, options = read_values(path)
        settings = settings_of(asked)
        config = config_of(changed(values, settings), tmp_path)
        changes = [*settings, *choices_of(found, asked, config, options)[0]]
        text = edited(path.read_text(encoding="utf-8"), changes, "Made for a test.", "my_data")
        recipe = tmp_path / f"{name}.yaml"
        recipe.write_text(text, encoding="utf-8")
        written, kept = read_values(recipe)
        assert written == changed(values, changes), name
        assert kept == options
        assert text.startswith("# Made for a test.\n")
        assert "Copy this file" not in text
        assert "example_" not in text
        config = read_recipe(recipe).config
        check_config(config, guess_model(config))
        assert config.max_train_steps == (600 if options.num_processes == 8 else 2000), name
        assert config.sample_prompts in ((), tuple(prompts))
        assert (config.height is None) == (config.max_pixels == 640 * 480 or "sd15" in name), name
