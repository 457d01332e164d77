"""The gradient of a step is that of its samples, however they are batched and shared out."""

from pathlib import Path

import polars as pl
import pytest
import torch
from conftest import Values, make_config, record_of, samples_of, train, train_to_end, write_images
from process_support import two_processes
from safetensors.torch import load_file

from diffsynth_dagster.cache.manifest import read_manifest
from diffsynth_dagster.training.build import build_step
from diffsynth_dagster.weights.hub import ModelHub
from diffsynth_dagster.weights.identify import find_model
from diffsynth_dagster.weights.load import load_component
from diffsynth_dagster.weights.models import Models


def relative(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> float:
    """Largest difference of two state dicts, relative to the norm of each tensor."""
    assert first.keys() == second.keys()
    return max(
        float((first[k] - second[k]).norm() / first[k].norm().clamp(min=1e-12)) for k in first
    )


def one_step(values: Values, folder: Path, **overrides: object) -> dict[str, torch.Tensor]:
    """The LoRA after one step of plain SGD: since lora_B starts at 0, it is -lr times its gradient."""
    run = train_to_end(
        values(customized_optimizer="torch.optim.SGD", weight_decay=0, **overrides), folder
    )
    steps = pl.read_csv(run / "metrics.csv").height
    assert steps == 1
    tensors = load_file(run / "epoch-0.safetensors")
    return {name: tensor for name, tensor in tensors.items() if "lora_B" in name}


def test_batching_and_accumulation_give_the_same_gradient(values: Values, tmp_path: Path) -> None:
    batch = one_step(values, tmp_path / "a", batch_size=8)
    accumulated = one_step(values, tmp_path / "b", batch_size=1, gradient_accumulation_steps=8)
    mixed = one_step(values, tmp_path / "c", batch_size=2, gradient_accumulation_steps=4)
    assert relative(batch, accumulated) < 1e-5
    assert relative(batch, mixed) < 1e-5


def test_gradient_checkpointing_changes_nothing(values: Values, tmp_path: Path) -> None:
    plain = one_step(values, tmp_path / "a", batch_size=8)
    flags = {"use_gradient_checkpointing": True}
    recomputed = one_step(values, tmp_path / "b", batch_size=8, **flags)
    flags = {"use_gradient_checkpointing_offload": True}
    offloaded = one_step(values, tmp_path / "c", batch_size=8, **flags)
    assert relative(plain, recomputed) < 1e-5
    assert relative(plain, offloaded) < 1e-5


def test_gradients_are_checkpointed_all_the_way(values: Values, tmp_path: Path) -> None:
    """Those of the text encoder go through the whole transformer, which is not trained."""
    config = make_config(
        values(trainable_models="text_encoder", use_gradient_checkpointing=True, batch_size=1)
    )
    found = find_model(config, ModelHub.from_environment())
    models = Models(found, torch.device("cpu"), torch.float32, on_cpu_first=False)
    step = build_step(config, models, torch.float32)
    assert step.loaded["dit"].gradient_checkpointing
    assert not any(p.requires_grad for p in step.loaded["dit"].parameters())


def test_parameters_without_gradient_need_no_flag(values: Values, tmp_path: Path) -> None:
    """The last block's text half gets none. The others get that of one process with all samples."""
    given = {"lora_target_modules": ["to_add_out", "to_q"], "learning_rate": 1e-2, "num_epochs": 2}
    alone = values(**given, batch_size=1, gradient_accumulation_steps=2)
    train_to_end(alone, tmp_path / "alone")
    for flag in (False, True):
        run = tmp_path / f"flag-{flag}"
        config = values(
            **given,
            batch_size=1,
            find_unused_parameters=flag,
            output_path=str(run),
            lora_dropout=0.0,
        )
        done = two_processes(config, tmp_path / f"{flag}.yaml")
        assert done.returncode == 0, done.stderr
        one, two = (load_file(f / "epoch-1.safetensors") for f in (tmp_path / "alone", run))
        assert one.keys() == two.keys()
        for name, tensor in one.items():
            torch.testing.assert_close(two[name], tensor, atol=1e-5, rtol=1e-3, msg=name)
        read = [
            pl.read_csv(f / "metrics.csv")["samples"].to_list() for f in (tmp_path / "alone", run)
        ]
        assert read[0] == read[1] == [2] * 8


def test_two_processes_give_the_same_gradient(values: Values, tmp_path: Path) -> None:
    alone = one_step(values, tmp_path / "a", batch_size=4, gradient_accumulation_steps=2)
    config = values(
        customized_optimizer="torch.optim.SGD", weight_decay=0, output_path=str(tmp_path / "b")
    )
    done = two_processes(config, tmp_path / "b.yaml")
    assert done.returncode == 0, done.stderr
    tensors = load_file(tmp_path / "b" / "epoch-0.safetensors")
    together = {name: tensor for name, tensor in tensors.items() if "lora_B" in name}
    assert relative(alone, together) < 1e-5
    record = record_of(tmp_path / "b")
    assert record.devices == ["cpu", "cpu"]


def test_uneven_data_over_two_processes(values: Values, tmp_path: Path) -> None:
    """Seven samples, two sizes, two processes: every sample counts once."""
    from diffsynth_dagster.training.batches import StepDataset

    data = write_images(tmp_path / "data", 7, [(32, 32), (48, 32), (32, 32)])
    config = values(
        dataset_base_path=str(data), dataset_metadata_path=str(data / "metadata.csv"), batch_size=2
    )
    train_to_end(config, tmp_path / "run")
    settings = make_config(config)
    found = find_model(settings, ModelHub.from_environment())
    run = tmp_path / "run"
    manifest = read_manifest(run)
    ranks = [StepDataset(settings, found, samples_of(run), rank, 2) for rank in range(2)]
    seen: list[str] = []
    for step in range(ranks[0].order.steps_per_epoch):
        batches = [rank[step] for rank in ranks]
        assert len(batches[0]) == len(batches[1])
        counted = [b for rank in batches for b in rank if b.scale]
        samples = [sample for batch in counted for sample in batch.samples]
        # DDP averages over processes: the scales must undo that.
        assert all(b.scale == pytest.approx(2 / len(samples)) for b in counted)
        seen += samples
    assert sorted(seen) == sorted(manifest.frame["sample"])


def test_loss_of_a_batch_is_the_mean_of_its_samples(values: Values, tmp_path: Path) -> None:
    """Prompts of different lengths are padded and masked."""
    _, run = train(values(), tmp_path / "run")
    config = make_config(values())
    found = find_model(config, ModelHub.from_environment())
    dit = load_component(found.components["dit"], "cpu", torch.float32)
    from diffsynth_dagster.training.batches import StepDataset
    from diffsynth_dagster.training.step import TrainingStep

    step = TrainingStep(found, {"dit": dit}, {}, config)
    whole = StepDataset(config.model_copy(update={"batch_size": 8}), found, samples_of(run), 0, 1)
    (batch,) = whole[0]
    lengths = batch.outputs["prompt_embeds_mask"].sum(1)
    assert len(set(lengths.tolist())) > 1
    with torch.no_grad():
        together = step(batch)
        single = StepDataset(
            config.model_copy(update={"batch_size": 1, "gradient_accumulation_steps": 8}),
            found,
            samples_of(run),
            0,
            1,
        )
        apart = {b.samples[0]: float(step(b)) for b in single[0]}
    for sample, loss in zip(batch.samples, together.tolist(), strict=True):
        assert loss == pytest.approx(apart[sample], rel=1e-5)
