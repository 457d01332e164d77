"""The templates in recipes/examples/ train well: length, clipping, samples, the rate of clips, sizes."""

import json
import re
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import yaml
from conftest import ROOT, write_images
from media_support import write_clip

from diffsynth_dagster.cache.row_sets import needed_beside_prompt
from diffsynth_dagster.config import TrainingConfig, read_recipe
from diffsynth_dagster.data.columns import Input
from diffsynth_dagster.dry_run import look_at_files, make_plan
from diffsynth_dagster.errors import WeightsError
from diffsynth_dagster.families.contract import Family
from diffsynth_dagster.preflight import check_config
from diffsynth_dagster.weights.identify import guess_model
from diffsynth_dagster.weights.resolved import resolve

TEMPLATES = sorted((ROOT / "recipes" / "examples").rglob("*.yaml"))
LENGTH = {"max_train_steps": 2000, "save_steps": 500, "max_grad_norm": 1.0, "dataset_repeat": 1}
AREAS = {"stable_diffusion": 512**2, "stable_diffusion_xl": 1024**2}
CHOICES = (
    *("height", "max_pixels", "num_frames", "frame_rate", "lora_rank", "learning_rate"),
    *("max_train_steps", "save_steps", "max_grad_norm", "sample_prompts"),
)


def read(path: Path) -> tuple[TrainingConfig, Family]:
    config = read_recipe(path).config
    return config, guess_model(config).family


def commented_samples(path: Path) -> str:
    """The comment around the samples that a template leaves out; empty where there is none."""
    text = path.read_text(encoding="utf-8")
    found = re.search(r"(?:^# .*\n)*^# sample_(?:prompts|table):.*\n(?:^# .*\n)*", text, re.M)
    return found[0] if found else ""


@pytest.mark.parametrize("path", TEMPLATES, ids=lambda path: path.stem)
def test_a_template_is_as_long_with_any_number_of_samples(path: Path) -> None:
    config, family = read(path)
    assert {name: getattr(config, name) for name in LENGTH} == LENGTH
    assert config.save_keep == (2 if config.trainable_models else None)
    assert config.learning_rate in ((1e-5, 5e-5) if config.trainable_models else (1e-4,))
    if family.geometry.published_frame_rate is not None:
        assert config.frame_rate == family.geometry.published_frame_rate
        assert config.frame_rate == (24 if "ti2v_5b" in path.stem else 16)
    if family.name in AREAS:
        assert (config.max_pixels, config.bucket_step) == (AREAS[family.name], 64)
    # Only clips, and what a teacher made, have a fixed size.
    fixed = family.geometry.frames is not None or config.distills
    assert (config.height is not None) == (config.width is not None) == fixed
    assert make_plan(config)["trained"]


@pytest.mark.parametrize("path", TEMPLATES, ids=lambda path: path.stem)
def test_a_template_shows_samples_or_says_how(path: Path) -> None:
    config, family = read(path)
    text, comment = path.read_text(encoding="utf-8"), commented_samples(path)
    assert config.sample_table is None, "a table that is not there would fail"
    if config.sample_prompts:
        assert comment == ""
        assert 2 <= len(config.sample_prompts) <= 3
        assert not needed_beside_prompt(family)
        return
    if not comment:  # one of two experts
        assert "one expert alone makes only its part" in text
        assert config.min_timestep_boundary > 0 or config.max_timestep_boundary < 1
        return
    # With the comment taken away, it is a recipe whose samples are made of what the comment names.
    first = re.search(r"^# sample_", comment, re.M)
    assert first is not None
    lines = comment[first.start() :].splitlines()
    named = yaml.safe_load("\n".join(line.removeprefix("# ") for line in lines))
    given = TrainingConfig.model_validate({**config.model_dump(), **named})
    check_config(given, resolve(given, family))
    assert (given.sample_table is not None) == bool(needed_beside_prompt(family))
    for stage in family.sample_stages:
        columns = [i.column for i in stage.reads if i.kind != "sizes"]
        assert all(re.search(rf"\b{name}\b", comment) for name in columns) or given.sample_prompts


def test_each_choice_has_a_comment_above_it() -> None:
    for path in TEMPLATES:
        lines = path.read_text(encoding="utf-8").splitlines()
        assert max(map(len, lines)) <= 125, path
        for above, line in pairwise(lines):
            name = line.partition(":")[0]
            assert name not in CHOICES or above.startswith("# "), (path, name)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A picture, a clip of five seconds and its sound, for tables of any template."""
    folder = tmp_path_factory.mktemp("data")
    write_images(folder / "pictures", 1, [(96, 80)])
    noise = np.random.default_rng(0).integers(-9000, 9000, (2, 44100 * 6), dtype=np.int16)
    write_clip(folder / "clip.mp4", 130, 24, noise)
    return folder


NUMBERS = {"frame_rate": 24, "in_context_downsample_factor": 2, "num_inference_steps": 4}
FILES = {"video": "clip.mp4", "audio": "clip.mp4"}


def value_of(item: Input) -> str | int:
    """A cell of a column."""
    if item.is_file:
        return FILES.get(item.kind, "pictures/0.png")
    if item.kind == "number":
        return NUMBERS.get(item.column, 1)
    return "canny" if item.pattern else "a caption"


@pytest.mark.parametrize("path", TEMPLATES, ids=lambda path: path.stem)
def test_the_dry_run_of_a_template_says_steps_and_visits(
    path: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of twelve rows with the columns that its first lines name. No model is there."""
    monkeypatch.setenv("DIFFSYNTH_MODEL_BASE_PATH", str(tmp_path / "models"))
    config, family = read(path)
    rows = [{i.column: value_of(i) for i in family.columns.named}] * 12
    table = tmp_path / "metadata.json"
    table.write_text(json.dumps(rows))
    own = {
        "dataset_base_path": str(data),
        "dataset_metadata_path": str(table),
        "output_path": str(tmp_path / "run"),
        "cache_path": str(data / "cache"),
    }
    config = config.model_copy(update=own)
    if config.model_paths:  # a file that is the user's to name
        with pytest.raises(WeightsError, match="the model file does not exist"):
            look_at_files(config, 1)
        return
    said = look_at_files(config, 1).values
    assert said["models"].startswith("not all are there")
    assert said["data"]["rows"] == {"ok": 12}
    course = said["course"]
    assert course["steps"] == 2000
    assert course["visits_of_a_sample"] == round(2000 / 12, 2)
    assert not (tmp_path / "run").exists()
