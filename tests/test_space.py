"""The space that a training needs is known before it starts: refused or warned of, not found out."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Values, make_config, train_to_end, write_images
from dagster_support import definitions_of, failure_of, write_recipe
from disk_support import needs_a_disk, on_a_small_disk
from process_support import forked_launches
from safetensors.torch import load_file

from diffsynth_dagster.cache.store import Store
from diffsynth_dagster.errors import TrainingError
from diffsynth_dagster.preflight import check_headers
from diffsynth_dagster.weights.hub import ModelHub
from diffsynth_dagster.weights.identify import find_model


def trainer(folder: Path, config: dict[str, Any]) -> list[str]:
    recipe = folder / "recipe.json"
    recipe.write_text(json.dumps(config))
    return ["-m", "diffsynth_dagster.train", "--recipe", str(recipe)]


def tensor_bytes(path: Path) -> int:
    return sum(tensor.nbytes for tensor in load_file(path).values())


@pytest.mark.parametrize(
    "trained",
    [
        {},
        {"lora_rank": 3, "lora_target_modules": ["to_k", "to_out.0", "img_mod.1"]},
        {"lora_base_model": [], "trainable_models": ["dit"]},
    ],
)
def test_the_size_of_a_checkpoint_is_told_from_shapes(
    values: Values, tmp_path: Path, trained: dict[str, Any]
) -> None:
    config = values(num_epochs=1, remove_prefix_in_ckpt="", **trained)
    found = find_model(make_config(config), ModelHub(Path(), skip_download=True))
    told = check_headers(make_config(config), found, torch.float32)
    run = train_to_end(config, tmp_path / "run")
    assert told == tensor_bytes(run / "epoch-0.safetensors") > 0


@needs_a_disk
def test_a_training_without_space_for_a_checkpoint_is_refused_before_it_encodes(
    values: Values, tmp_path: Path
) -> None:
    disk, store = tmp_path / "disk", tmp_path / "store"
    config = values(cache_path=str(store), output_path=str(disk / "run"), lora_rank=4096)
    done = on_a_small_disk(1 << 20, disk, *trainer(tmp_path, config))
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    (needed,) = re.findall(r"no space left in .*: at least ([\d,]+) bytes", done.stderr)
    assert int(needed.replace(",", "")) > 1 << 20
    assert Store(store).index().height == 0


@needs_a_disk
def test_checkpoints_that_will_not_all_fit_are_warned_of(values: Values, tmp_path: Path) -> None:
    run = train_to_end(values(num_epochs=1), tmp_path / "run")
    size = (run / "epoch-0.safetensors").stat().st_size
    disk = tmp_path / "disk"
    config = values(output_path=str(disk / "run"), num_epochs=100)
    done = on_a_small_disk(20 * size, disk, *trainer(tmp_path, config))
    assert done.returncode == 2, done.stderr
    warning, error = done.stderr.index("warning: the 100 checkpoints"), done.stderr.index("error: ")
    assert warning < error
    assert "no space left in" in done.stderr[error:]
    (needed,) = re.findall(r"the 100 checkpoints and 2 states .* ([\d,]+) bytes", done.stderr)
    (state,) = (run / "state").glob("*/*.safetensors")
    kept_and_new = 3 * tensor_bytes(state)
    assert int(needed.replace(",", "")) == pytest.approx(
        100 * tensor_bytes(run / "epoch-0.safetensors") + kept_and_new, rel=0.03
    )


@needs_a_disk
def test_what_the_store_will_need_is_warned_of_by_the_first_batch(
    values: Values, tmp_path: Path
) -> None:
    """Pictures of different sizes: the smallest are encoded first."""
    data = write_images(tmp_path / "data", 40, [(32, 32), (64, 64), (128, 64), (128, 128)])
    config = values(
        dataset_base_path=str(data),
        dataset_metadata_path=str(data / "metadata.csv"),
        height=None,
        width=None,
        max_pixels=128 * 128,
        task="sft:data_process",
    )
    undisturbed = {**config, "cache_path": str(tmp_path / "store")}
    train_to_end(undisturbed, tmp_path / "run")
    rows = Store(tmp_path / "store").index()
    disk = tmp_path / "disk"
    small = {**config, "cache_path": str(disk / "store"), "output_path": str(tmp_path / "other")}
    done = on_a_small_disk(400_000, disk, *trainer(tmp_path, small))
    said = re.findall(r"warning: what '(\w+)' encodes will need about ([\d,]+) bytes", done.stderr)
    assert said, done.stderr
    for stage, needed in said:
        output = {"image": "image", "prompt": "prompt_embeds"}[stage]
        wrote = rows.filter(rows["output"] == output)["bytes"].sum()
        assert int(needed.replace(",", "")) == pytest.approx(wrote, rel=0.3), stage


class Failing(torch.optim.SGD):
    def step(self, closure: Any = None) -> Any:
        raise TrainingError("it ends here")


@pytest.mark.soak
def test_dagster_logs_the_warning(
    values: Values, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """More checkpoints than any disk holds; the training ends in its first step."""
    config = values(num_epochs=10**12, customized_optimizer="test_space.Failing")
    write_recipe(tmp_path / "recipes", "tiny", config)
    job = definitions_of(tmp_path / "recipes").resolve_job_def("train_tiny")
    with forked_launches():
        done = job.execute_in_process(raise_on_error=False)
    said = capsys.readouterr().err
    assert "tiny/checkpoints: warning: the 1000000000000 checkpoints and 2 states of the" in said
    assert failure_of(done, "tiny__checkpoints") == "it ends here"
