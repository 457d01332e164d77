"""What the training refuses, or would do, and a dry run says before: split training, states, downloads."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import Values, train, train_to_end, write_images
from safetensors.torch import load_file, save_file
from test_resume import stop_after

SAMPLES = {"sample_num_inference_steps": 1, "height": 32, "width": 32}
LATER = "not all are there: the training downloads them when it begins"


@pytest.fixture
def answer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """What is said of a training that is refused; nothing where it is not."""

    def ask(given: dict[str, Any], run: Path | None = None, *flags: str) -> str:
        capsys.readouterr()
        code, _ = train(given, run or tmp_path / "asked", *flags)
        said = capsys.readouterr().err
        assert code == (2 if "error: " in said else 0), said
        return said if code else ""

    return ask


@pytest.fixture
def both(answer: Callable[..., str], tmp_path: Path) -> Callable[..., str]:
    """What is said of a training that is refused, by the dry run as by the training itself."""

    def ask(given: dict[str, Any], run: Path | None = None) -> str:
        dry, own = (answer(given, run or tmp_path / "asked", *f) for f in (("--dry_run",), ()))
        assert dry == own
        assert dry
        return dry

    return ask


@pytest.fixture(scope="module")
def encoded(shared_values: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set that was encoded with one prompt, for samples without guidance."""
    given = {**shared_values, **SAMPLES, "sample_prompts": ["a picture"], "sample_cfg_scale": 1}
    run = train_to_end(
        {**given, "task": "sft:data_process"}, tmp_path_factory.mktemp("encoded") / "run"
    )
    return run


def second_half(given: dict[str, Any], encoded: Path, **more: Any) -> dict[str, Any]:
    """The training on a data set that was encoded before, without the text encoder."""
    models = [given["model_paths"][0], given["model_paths"][2]]
    values = {**given, **SAMPLES, "model_paths": models, "dataset_base_path": str(encoded)}
    del values["dataset_metadata_path"]
    return {**values, "task": "sft:train", **more}


def test_prompts_that_cannot_be_encoded_any_more(
    values: Values, encoded: Path, both: Callable[..., str], answer: Callable[..., str]
) -> None:
    known: dict[str, Any] = {"sample_prompts": ["a picture"], "sample_cfg_scale": 1}
    guided = second_half(values(), encoded, **{**known, "sample_cfg_scale": 3})
    error = both(guided)
    assert "without the negative prompt '' that guidance needs" in error
    for name in ("sample_prompts", "sample_cfg_scale", "sample_negative_prompt", "text_encoder"):
        assert name in error
    other = second_half(values(), encoded, **{**known, "sample_prompts": ["another"]})
    assert "without the sample prompt 'another'" in both(other)
    same = second_half(values(), encoded, **known)
    assert answer(same, None, "--dry_run") == ""
    listed = {**guided, **other, "model_paths": values()["model_paths"]}
    assert answer(listed, None, "--dry_run") == ""
    assert answer(listed) == ""  # they are encoded before the training


def test_another_model_than_the_data_set_was_encoded_with(
    values: Values, encoded: Path, tmp_path: Path, both: Callable[..., str]
) -> None:
    given = second_half(values(), encoded)
    vae = Path(given["model_paths"][1])
    shutil.copytree(vae.parent, tmp_path / "vae")
    changed = {n: t + 1 for n, t in load_file(vae).items()}
    save_file(changed, tmp_path / "vae" / vae.name)
    given["model_paths"] = [given["model_paths"][0], str(tmp_path / "vae" / vae.name)]
    assert "encoded with another 'vae'" in both(given)


def test_a_model_that_is_half_downloaded(
    values: Values,
    tiny_qwen: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    answer: Callable[..., str],
) -> None:
    """Its other shard comes when the training begins; what else it starts from is read now."""
    monkeypatch.setenv("MODELSCOPE_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("DIFFSYNTH_MODEL_BASE_PATH", str(tmp_path / "models"))
    folder = tmp_path / "models" / "Qwen" / "Qwen-Image" / "transformer"
    shutil.copytree(tiny_qwen / "transformer", folder)
    whole = folder / "diffusion_pytorch_model.safetensors"
    tensors = load_file(whole)
    whole.unlink()
    first = dict(sorted(tensors.items())[: len(tensors) // 2])
    save_file(first, folder / "diffusion_pytorch_model-00001-of-00002.safetensors")
    hub = "Qwen/Qwen-Image:transformer/*.safetensors"
    given = values(model_paths=values()["model_paths"][1:], model_id_with_origin_paths=hub)
    train_to_end(given, tmp_path / "run", "--dry_run")
    assert json.loads(capsys.readouterr().out)["models"] == LATER
    damaged = tmp_path / "damaged.safetensors"
    damaged.write_text("nonsense")
    for name in ("lora_checkpoint", "preset_lora_path"):
        assert "cannot be read" in answer({**given, name: str(damaged)}, None, "--dry_run")
    monkeypatch.setenv("DIFFSYNTH_SKIP_DOWNLOAD", "true")
    assert "shard 2 of 2 is missing" in answer(given, None, "--dry_run")


def test_an_empty_folder_that_a_function_fills(
    values: Values, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "README.md").write_text("filled each night")
    made = {"customized_dataset": "test_dry_run_files.make_none", "dataset_metadata_path": None}
    given = values(**made, dataset_base_path=str(folder))
    train_to_end(given, tmp_path / "run", "--dry_run")
    assert json.loads(capsys.readouterr().out)["data"].startswith("made by test_dry_run_files.")
    shutil.copytree(write_images(tmp_path / "pictures", 2), folder, dirs_exist_ok=True)
    (folder / "metadata.csv").unlink()
    for picture in folder.glob("*.png"):
        picture.with_suffix(".txt").write_text("a caption")
    train_to_end(given, tmp_path / "run", "--dry_run")
    assert json.loads(capsys.readouterr().out)["data"]["rows"] == {"ok": 2}


def test_a_run_folder_that_is_not_gone_on_from(
    values: Values,
    tmp_path: Path,
    both: Callable[..., str],
    answer: Callable[..., str],
) -> None:
    run = tmp_path / "run"
    assert "no whole state to go on from" in both(values(resume="must"), run)
    given = values(num_epochs=4, lr_scheduler="cosine", validation_split=2, enable_csv_log=True)
    stop_after({**given, "output_path": str(run)}, 2)
    left = sorted(run.rglob("*"))
    for change, said in (
        ({"lora_rank": 8}, "differs in: lora_rank (was 4)"),
        ({"lora_rank": 8, "resume": "must"}, "differs in: lora_rank (was 4)"),
        ({"num_epochs": 6}, "the number of steps"),
        ({"batch_size": 1}, "the samples of each step"),
        ({"mixed_precision": "bf16"}, "differs in: mixed_precision"),
        ({"num_processes": 2}, "the samples of each step"),
    ):
        assert said in answer({**given, **change}, run, "--dry_run")
    # What it goes on from, or what begins anew.
    for change in ({}, {"resume": "must"}, {"lora_rank": 8, "resume": "never"}):
        assert answer({**given, **change}, run, "--dry_run") == ""
    assert answer({**given, "lora_rank": 8, "resume": "same"}, run, "--dry_run") == ""
    fewer = write_images(tmp_path / "fewer", 6)
    given |= {"dataset_base_path": str(fewer), "dataset_metadata_path": f"{fewer}/metadata.csv"}
    assert "differs in: the samples, " in answer(given, run, "--dry_run")
    assert sorted(run.rglob("*")) == left


def test_another_base_model_for_the_state_of_a_second_half(
    values: Values, encoded: Path, tmp_path: Path, both: Callable[..., str]
) -> None:
    """The weights are compared where the data set is encoded."""
    given = second_half(values(num_epochs=4, enable_csv_log=True), encoded)
    stop_after({**given, "output_path": str(tmp_path / "run")}, 2)
    dit = Path(given["model_paths"][0])
    shutil.copytree(dit.parent, tmp_path / "dit")
    save_file({n: t + 1 for n, t in load_file(dit).items()}, tmp_path / "dit" / dit.name)
    given["model_paths"] = [str(tmp_path / "dit" / dit.name), given["model_paths"][1]]
    assert "differs in: the weights of dit" in both(given, tmp_path / "run")


def test_a_tracker_that_is_not_installed(
    values: Values, monkeypatch: pytest.MonkeyPatch, both: Callable[..., str]
) -> None:
    monkeypatch.setattr("diffsynth_dagster.training.join.get_available_trackers", list)
    assert "wandb is not installed" in both(values(enable_wandb_log=True))
