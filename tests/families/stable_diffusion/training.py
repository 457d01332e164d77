"""Trainings of the tiny models, and the loss of a batch by diffusers' own training example."""

from pathlib import Path
from typing import Any

import torch
from conftest import make_config, samples_of, train_to_end
from diffusers import DDPMScheduler
from diffusers.training_utils import compute_snr
from family_case import Case
from torch.nn import functional as F

from diffsynth_dagster.objective.noise import noise, timestep_index
from diffsynth_dagster.training.batches import Batch, StepDataset
from diffsynth_dagster.training.step import TrainingStep
from diffsynth_dagster.weights.hub import ModelHub
from diffsynth_dagster.weights.identify import find_model
from diffsynth_dagster.weights.load import load_component
from diffsynth_dagster.weights.resolved import ResolvedModel

HUB = ModelHub(Path(), skip_download=True)


def values_of(case: Case, model: Path, data: Path, **overrides: Any) -> dict[str, Any]:
    """The parameters of a LoRA training of one step; a value of None leaves one out."""
    values = {
        "family": case.family,
        "dataset_base_path": str(data.parent),
        "dataset_metadata_path": str(data),
        "lora_base_model": case.base,
        "lora_rank": 4,
        "batch_size": 4,
        "learning_rate": 1e-3,
        "cache_path": str(data.parent / "cache"),
        "output_path": "unused",
        **case.models(model, "diffusers"),
        **case.parameters,
        **overrides,
    }
    return {name: value for name, value in values.items() if value is not None}


def losses_of(values: dict[str, Any], folder: Path) -> tuple[ResolvedModel, Batch, torch.Tensor]:
    """Our losses (B,) of the first batch of a training, with nothing trained yet."""
    run = train_to_end({**values, "task": "sft:data_process"}, folder)
    config = make_config({**values, "output_path": str(run)})
    found = find_model(config, HUB)
    (batch,) = StepDataset(config, found, samples_of(run), 0, 1)[0]
    unet = load_component(found.components["unet"], "cpu", torch.float32)
    with torch.no_grad():
        return found, batch, TrainingStep(found, {"unet": unet}, {}, config)(batch)


def require_equal_computations(case: Case, model: Path, data: Path) -> None:
    """Fail unless the modules of a whole checkpoint, whose settings come from the shapes alone,
    compute what those with a config.json do."""
    made: list[dict[str, torch.Tensor]] = []
    for layout in ("diffusers", "original"):
        values = {**values_of(case, model, data), **case.models(model, layout)}
        found = find_model(make_config(values), HUB)
        loaded: dict[str, Any] = {
            name: load_component(f, "cpu", torch.float32) for name, f in found.components.items()
        }
        for tokenizer in found.family.tokenizers:
            loaded[tokenizer.name] = tokenizer.load(str(found.tokenizers[tokenizer.name]))
        source = torch.Generator().manual_seed(0)
        pixels = torch.rand(3, 64, 64, generator=source) * 2 - 1
        sample = {"prompt": "a cat", "image": pixels, "image_sizes": (64, 64, 0, 0, 64, 64)}
        outputs: dict[str, torch.Tensor] = {}
        with torch.no_grad():
            for stage in found.family.stages:
                outputs |= {n: t[None] for n, t in stage.run(loaded, [sample])[0].items()}
            x_t, t = {"image": outputs.pop("image")}, torch.tensor([500.0])
            prediction = found.family.denoise(loaded["unet"], loaded, outputs, x_t, t)
        made.append({**outputs, "x_t": x_t["image"], "prediction": prediction["image"]})
    assert made[0].keys() == made[1].keys()
    for name, tensor in made[0].items():
        torch.testing.assert_close(tensor, made[1][name], atol=1e-5, rtol=1e-5, msg=name)


def noise_of(batch: Batch, shape: torch.Size) -> tuple[torch.Tensor, torch.Tensor]:
    """The noise (B, …) and the timesteps (B,) that the samples of a batch are seen with."""
    seen = list(zip(batch.samples, batch.visits, strict=True))
    epsilon = torch.stack([noise(0, s, v, "image", tuple(shape[1:])) for s, v in seen])
    indices = [timestep_index(0, sample, visit, 0, 1000) for sample, visit in seen]
    return epsilon, 999 - torch.tensor(indices)


def published_losses(
    scheduler: DDPMScheduler,
    unet: Any,
    latents: torch.Tensor,
    epsilon: torch.Tensor,
    timesteps: torch.Tensor,
    snr_gamma: float | None,
    **conditions: Any,
) -> torch.Tensor:
    """The losses (B,) by the formula of diffusers' examples for training text to image."""
    noisy = scheduler.add_noise(latents, epsilon, timesteps)
    kind = scheduler.config["prediction_type"]
    target = epsilon if kind == "epsilon" else scheduler.get_velocity(latents, epsilon, timesteps)
    with torch.no_grad():
        prediction = unet(noisy, timesteps, **conditions).sample
    losses = F.mse_loss(prediction, target, reduction="none").mean(dim=(1, 2, 3))
    if snr_gamma is None:
        return losses
    snr = compute_snr(scheduler, timesteps)
    weights = torch.stack([snr, snr_gamma * torch.ones_like(snr)], dim=1).min(dim=1)[0]
    return losses * weights / (snr if kind == "epsilon" else snr + 1)
