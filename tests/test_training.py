"""The promises of a training, on a tiny model with random weights."""

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import polars as pl
import psutil
import pytest
import torch
from conftest import Values, make_config, record_of, train, train_to_end, write_images
from lora_support import by_module
from process_support import in_processes
from safetensors.torch import load_file

from diffsynth_dagster.cache.manifest import read_manifest
from diffsynth_dagster.export import export_run, how_to_load, verify_export
from diffsynth_dagster.families import find_family
from diffsynth_dagster.run.events import MEASURED
from diffsynth_dagster.training.adapters import saved_name
from diffsynth_dagster.training.batches import collate
from diffsynth_dagster.training.lora import add_lora
from diffsynth_dagster.training.parallel import Parallel
from diffsynth_dagster.weights.header import read_metadata
from diffsynth_dagster.weights.hub import ModelHub
from diffsynth_dagster.weights.identify import find_model
from diffsynth_dagster.weights.load import load_component


def as_printed(out: str, pipe: Any) -> Any:
    """A pipeline after what the trainer says at its end."""
    import diffusers

    file, line = out.splitlines()[-2:]
    assert Path(file.removeprefix("exported ")).is_file()
    exec(line.strip(), {"diffusers": diffusers, "pipe": pipe})
    return pipe


def test_same_seed_gives_the_same_bytes(values: Values, tmp_path: Path) -> None:
    for name in ("a", "b"):
        train_to_end(values(), tmp_path / name)
    first = (tmp_path / "a" / "epoch-0.safetensors").read_bytes()
    assert first == (tmp_path / "b" / "epoch-0.safetensors").read_bytes()
    train_to_end(values(seed=1), tmp_path / "c")
    assert first != (tmp_path / "c" / "epoch-0.safetensors").read_bytes()


def test_checkpoint_names_start_at_the_module(values: Values, tmp_path: Path) -> None:
    _, run = train(values(), tmp_path / "run")
    tensors = load_file(run / "epoch-0.safetensors")
    layer = "diffusion_model.transformer_blocks.0.attn.to_q"
    assert float(tensors[f"{layer}.alpha"]) == len(tensors[f"{layer}.lora_A.weight"]) == 4
    assert all(name.startswith("diffusion_model.transformer_blocks.") for name in tensors)
    notes = json.loads(read_metadata(run / "epoch-0.safetensors")["diffsynth_dagster"])
    record = record_of(run)
    assert notes["samples_digest"] == read_manifest(run).digest == record.samples_digest
    assert notes["base"].keys() == {"dit", "text_encoder", "vae", "tokenizer"}
    assert record.finished
    assert record.devices == ["cpu"]


def test_second_run_encodes_nothing(
    values: Values, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = values(cache_path=str(tmp_path / "cache"))
    train(config, tmp_path / "a")
    assert "image: 0 in the store, 8 encoded" in capsys.readouterr().out
    files = sorted((tmp_path / "cache").rglob("*.safetensors"))
    train(config, tmp_path / "b")
    assert "image: 8 in the store, 0 encoded" in capsys.readouterr().out
    assert files == sorted((tmp_path / "cache").rglob("*.safetensors"))


def test_split_training_equals_training_at_once(values: Values, tmp_path: Path) -> None:
    _, whole = train(values(cache_path=str(tmp_path / "c1")), tmp_path / "whole")
    config = values(cache_path=str(tmp_path / "c2"))
    train_to_end(config, tmp_path / "encoded", "--task", "sft:data_process")
    assert not (tmp_path / "encoded" / "epoch-0.safetensors").exists()
    # The second stage needs neither the images, nor the encoders, nor the metadata.
    second = {
        **config,
        "dataset_base_path": str(tmp_path / "encoded"),
        "model_paths": config["model_paths"][:1],
    }
    del second["dataset_metadata_path"]
    train_to_end(second, tmp_path / "split", "--task", "sft:train")
    first = (whole / "epoch-0.safetensors").read_bytes()
    assert first == (tmp_path / "split" / "epoch-0.safetensors").read_bytes()


@pytest.mark.parametrize("runs_behind", [False, True], ids=["at-once", "late"])
def test_a_loss_that_is_not_finite_ends_the_training(
    values: Values,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    runs_behind: bool,
) -> None:
    monkeypatch.setattr(Parallel, "runs_behind", runs_behind)  # as a GPU does
    given = values(learning_rate=1000.0, num_epochs=20, save_steps=1)
    code, run = train(given, tmp_path / "run")
    assert code == 2
    error = capsys.readouterr().err
    assert re.search(
        r"the training went astray in step \d+: the loss is .*learning_rate = 1000", error, re.S
    )
    steps = pl.read_csv(run / "metrics.csv")
    assert steps.height < 40
    record = record_of(run)
    assert not record.all_losses_finite
    assert not record.finished
    # The step that went astray leaves no checkpoint; those before it are kept.
    assert list(record.checkpoints) == [f"step-{n}.safetensors" for n in range(1, steps.height)]


def test_text_encoder_is_trained_inside_the_step(values: Values, tmp_path: Path) -> None:
    """Its stage is not cached, the image's is; the prefix keeps the modules apart."""
    run = train_to_end(
        values(trainable_models=["text_encoder"], batch_size=4, learning_rate=1e-4),
        tmp_path / "run",
    )
    columns = read_manifest(run).frame.columns
    assert "key:image" in columns
    assert "key:prompt" not in columns
    tensors = load_file(run / "epoch-0.safetensors")
    assert all(name.startswith("pipe.text_encoder.") for name in tensors)
    record = record_of(run)
    assert record.changed_tensors > 0


def test_several_modules_at_once(values: Values, tmp_path: Path) -> None:
    config = {**values(), "trainable_models": ["text_encoder"]}
    run = train_to_end(config, tmp_path / "run")
    tensors = load_file(run / "epoch-0.safetensors")
    kinds = {name.split(".")[0] for name in tensors}
    assert kinds == {"pipe", "diffusion_model"}
    # The LoRA in it can be gone on from.
    start = {"lora_checkpoint": str(run / "epoch-0.safetensors"), "num_epochs": 1}
    train_to_end({**config, **start}, tmp_path / "again")
    settings = make_config({**config, "output_path": str(run)})
    found = find_model(settings, ModelHub.from_environment())
    record = record_of(run)
    exported = export_run(settings, record, found)
    assert {e.components for e in exported} == {("dit",), ("text_encoder",)}
    for item in exported:
        verify_export(item, found)
    folder = run / "exports" / "diffusers" / "text_encoder"
    assert [how_to_load(item, found.family) for item in exported] == [
        f'pipe.load_lora_weights("{folder.parent}/pytorch_lora_weights.safetensors")',
        "pipe.text_encoder = transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained("
        f'"{folder}")',
        # The files that it was loaded from have other names than the module of transformers.
        f"# {run}/exports/authors/text_encoder/model.safetensors has the authors' names: for ComfyUI and "
        "DiffSynth-Studio",
    ]


def test_full_training_exports_a_model_folder(
    values: Values, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = values(trainable_models=["dit"], learning_rate=1e-4, save_steps=1)
    run = train_to_end(config, tmp_path / "run", exports=True)
    assert sorted(p.name for p in run.glob("*.safetensors")) == [
        "step-1.safetensors",
        "step-2.safetensors",
    ]
    loaded = as_printed(capsys.readouterr().out, SimpleNamespace()).transformer
    trained = load_file(run / "step-2.safetensors")
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, trained[name])


@pytest.mark.parametrize("alpha", [None, 2.0])
def test_exported_lora_predicts_the_same_in_diffusers(
    values: Values,
    tmp_path: Path,
    tiny_qwen: Path,
    alpha: float | None,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from diffusers import (
        AutoencoderKLQwenImage,
        FlowMatchEulerDiscreteScheduler,
        QwenImagePipeline,
        QwenImageTransformer2DModel,
    )

    config = values(num_epochs=3, learning_rate=1e-2, lora_alpha=alpha)
    _, run = train(config, tmp_path / "run", exports=True)
    printed = capsys.readouterr().out
    settings = make_config({**config, "output_path": str(run)})
    found = find_model(settings, ModelHub.from_environment())
    ours = load_component(found.components["dit"], "cpu", torch.float32)
    base = load_component(found.components["dit"], "cpu", torch.float32)
    add_lora(settings, found.family, ours, "dit")
    trained = by_module(run / "epoch-2.safetensors", "qwen_image")
    parameters = {saved_name(name): p for name, p in ours.named_parameters()}
    for name, tensor in trained.items():
        parameters[name].data.copy_(tensor)

    make: object = QwenImagePipeline
    pipeline = make(  # pyright: ignore
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=AutoencoderKLQwenImage.from_pretrained(tiny_qwen / "vae"),
        text_encoder=None,
        tokenizer=None,
        transformer=QwenImageTransformer2DModel.from_pretrained(tiny_qwen / "transformer"),
    )
    as_printed(printed, pipeline)
    torch.manual_seed(3)
    inputs = {
        "x_t": {"image": torch.randn(2, 16, 4, 6)},
        "conditions": collate(
            found.family.stage("prompt").yields,
            [{"prompt_embeds": torch.randn(length, 256)} for length in (5, 9)],
        ),
        "t": torch.tensor([900.0, 100.0]),
    }
    with torch.no_grad():
        mine = found.family.denoise(ours, {}, **inputs)["image"]
        theirs = found.family.denoise(pipeline.transformer, {}, **inputs)["image"]
        without = found.family.denoise(base, {}, **inputs)["image"]
    assert float((mine - theirs).abs().max()) <= 1e-5
    assert float((mine - without).abs().max()) > 1e-3


def test_twenty_steps_lower_the_loss(values: Values, tmp_path: Path) -> None:
    data = write_images(tmp_path / "data", 1)
    config = values(
        dataset_base_path=str(data),
        dataset_metadata_path=str(data / "metadata.csv"),
        trainable_models=["dit"],
        learning_rate=1e-3,
        batch_size=8,
        dataset_repeat=160,
    )
    _, run = train(config, tmp_path / "run")
    loss = pl.read_csv(run / "metrics.csv")["loss"]
    assert len(loss) == 20
    assert loss[-5:].mean() < loss[:5].mean()


def test_sample_pictures_and_logs(values: Values, tmp_path: Path) -> None:
    config = values(
        sample_prompts=["a", "another, longer"],
        sample_num_inference_steps=2,
        sample_cfg_scale=2.0,
        height=32,
        width=32,
        enable_csv_log=True,
        lr_warmup_steps=2,
        max_grad_norm=0.5,
    )
    _, run = train(config, tmp_path / "run")
    assert {p.name for p in (run / "samples").iterdir()} == {"step-0.png", "step-2.png"}
    assert pl.read_csv(run / "loss.csv").columns == ["step", "loss"]
    metrics = pl.read_csv(run / "metrics.csv")
    assert metrics["step"].to_list() == [1, 2]
    assert metrics["learning_rate"].to_list() == [0.0, 5e-4]


def test_the_time_of_a_step_is_split(values: Values, tmp_path: Path) -> None:
    """Tokens are those of the samples' latents: patches of 16x16 pixels."""
    _, run = train(values(batch_size=3, height=32, width=64), tmp_path / "run")
    metrics = pl.read_csv(run / "metrics.csv")
    assert sorted(metrics["samples"]) == [2, 3, 3]
    assert metrics["tokens"].to_list() == [8 * count for count in metrics["samples"]]
    parts = metrics["forward_backward_seconds"] + metrics["optimizer_seconds"]
    assert (parts - metrics["seconds"]).abs().max() == pytest.approx(0.0, abs=1e-6)
    whole = metrics["seconds"] + metrics["data_seconds"]
    for name in ("samples", "tokens"):
        wanted = metrics[name] / whole
        assert metrics[f"{name}_per_second"].to_list() == pytest.approx(wanted.to_list())
    for name in MEASURED:
        assert (metrics[name] > 0).all()
    # No process has less memory than its interpreter, nor more than the machine.
    assert metrics["peak_memory_bytes"].is_sorted()
    assert 1e8 < metrics["peak_memory_bytes"][0] < psutil.virtual_memory().total


def test_automatic_targets(tmp_path: Path) -> None:
    from diffusers import QwenImageTransformer2DModel

    from diffsynth_dagster.training.lora_targets import lora_targets

    config = make_config(
        {
            "dataset_base_path": "d",
            "dataset_metadata_path": "m.csv",
            "model_paths": ["x.safetensors"],
            "lora_base_model": "dit",
            "lora_target_modules": "",
        }
    )
    with torch.device("meta"):
        wide = QwenImageTransformer2DModel(
            num_layers=2, num_attention_heads=4, attention_head_dim=128, joint_attention_dim=64
        )
    targets = lora_targets(config, find_family("qwen_image"), wide, "dit")
    assert "transformer_blocks.0.attn.to_q" in targets
    assert all(name.startswith("transformer_blocks.") for name in targets)
    assert "img_in" not in targets


def test_worker_processes_read_the_same(values: Values, tmp_path: Path) -> None:
    _, alone = train(values(), tmp_path / "a")
    workers = train_to_end(values(dataset_num_workers=2, seed=0), tmp_path / "b")
    first = (alone / "epoch-0.safetensors").read_bytes()
    assert first == (workers / "epoch-0.safetensors").read_bytes()


def test_a_seed_may_be_large_and_bf16_samples(values: Values, tmp_path: Path) -> None:
    config = values(
        seed=2**63 - 1,
        mixed_precision="bf16",
        trainable_models=["dit"],
        sample_prompts=["a"],
        sample_num_inference_steps=1,
        height=32,
        width=32,
    )
    # A process of its own: accelerate's precision is one for each process.
    run = {**config, "output_path": str(tmp_path / "run")}
    done = in_processes(1, run, tmp_path / "recipe.json")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "samples" / "step-2.png").is_file()
