"""Whether a step would only do again what it did, told by the states of files."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import write_images

from diffsynth_dagster.config import TrainingConfig, read_config
from diffsynth_dagster.data.prepare import prepare_data
from diffsynth_dagster.facts import fact_cache_of
from diffsynth_dagster.families import find_family
from diffsynth_dagster.run.file_states import NotTheSame, digest_left, look_at


@pytest.fixture
def config(tmp_path: Path) -> TrainingConfig:
    """A data set of links, which was checked."""
    first = write_images(tmp_path / "first", 3)
    shutil.copytree(first, tmp_path / "second")
    data = tmp_path / "data"
    data.mkdir()
    for path in first.glob("*.png"):
        (data / path.name).symlink_to(path)
    shutil.copy(first / "metadata.csv", data)
    config = read_config(
        {
            "family": "qwen_image",
            "dataset_base_path": str(data),
            "dataset_metadata_path": str(data / "metadata.csv"),
            "model_paths": ["none.safetensors"],
            "lora_base_model": "dit",
            "output_path": str(tmp_path / "run"),
            "cache_path": str(tmp_path / "cache"),
            "max_rejected_fraction": 0.5,
            "allow_outside_base_path": True,
        },
        "test",
    )
    check(config)
    return config


def check(config: TrainingConfig) -> None:
    with fact_cache_of(config.cache_path) as fact_cache:
        prepare_data(config, find_family("qwen_image").columns, fact_cache)


def edit_caption(data: Path) -> None:
    (data / "1.txt").write_text("another caption")


def add_picture(data: Path) -> None:
    shutil.copy(data / "1.png", data / "3.png")


@pytest.mark.parametrize("change", [edit_caption, add_picture])
def test_a_folder_without_a_table_is_looked_at_file_by_file(
    config: TrainingConfig, change: Callable[[Path], None]
) -> None:
    data = Path(config.dataset_base_path)
    (data / "metadata.csv").unlink()
    for number in range(3):
        (data / f"{number}.txt").write_text("a caption")
    folder = config.model_copy(update={"dataset_metadata_path": str(data)})
    before = look_at("metadata", folder)
    assert look_at("metadata", folder) == before
    change(data)
    assert look_at("metadata", folder) != before


def relink(data: Path) -> None:
    (data / "1.png").unlink()
    (data / "1.png").symlink_to(data.parent / "second" / "1.png")


def touch(data: Path) -> None:
    os.utime(data.parent / "first" / "1.png", (1, 1))


def remove(data: Path) -> None:
    (data / "1.png").unlink()


@pytest.mark.parametrize("change", [relink, touch, remove])
def test_rows_are_what_was_checked(config: TrainingConfig, change: object) -> None:
    left = digest_left("metadata", config)
    check(config)
    assert digest_left("metadata", config) == left
    assert callable(change)
    change(Path(config.dataset_base_path))
    with pytest.raises(NotTheSame):
        digest_left("metadata", config)


def test_rejected_rows_are_looked_at_anew_by_the_check_alone(config: TrainingConfig) -> None:
    remove(Path(config.dataset_base_path))
    check(config)
    with pytest.raises(NotTheSame):
        digest_left("metadata", config)
    assert look_at("latents", config).digest


def test_what_a_step_reads(config: TrainingConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parameters of later steps are not it; files that are downloaded meanwhile are no change."""
    before = look_at("metadata", config)
    assert look_at("metadata", config) == before
    later = config.model_copy(update={"learning_rate": 0.5})
    assert look_at("metadata", later) == before
    assert look_at("metadata", config.model_copy(update={"height": 32, "width": 32})) != before
    monkeypatch.chdir(Path(config.output_path).parent)
    Path("none.safetensors").write_bytes(b"weights")
    downloaded = look_at("metadata", config)
    assert downloaded != before
    assert before.has_grown_to(downloaded)
    table = Path(config.dataset_metadata_path or "")
    table.write_text(table.read_text() + "\n")
    assert not before.has_grown_to(look_at("metadata", config))
