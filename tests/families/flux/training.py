"""Trainings of the tiny FLUX.1: their parameters and their exports."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from conftest import make_config, record_of
from families.flux.cases import CASES, rows

from diffsynth_dagster.export import export_run
from diffsynth_dagster.export.run import Exported
from diffsynth_dagster.weights.hub import ModelHub
from diffsynth_dagster.weights.identify import find_model

HUB = ModelHub(Path(), skip_download=True)
Values = Callable[..., dict[str, Any]]


def make_values(model: Path, folder: Path) -> Values:
    """The parameters of a LoRA training of one step; a value of None leaves one out."""
    tables = {
        "plain": rows(folder / "plain"),
        "control": rows(folder / "control", "controlnet_image", (32, 32), mode=True),
    }

    def make(data: str = "plain", layout: str = "diffusers", **overrides: Any) -> dict[str, Any]:
        base: dict[str, Any] = {
            "family": "flux",
            "dataset_base_path": str(tables[data].parent),
            "dataset_metadata_path": str(tables[data]),
            **CASES[0].models(model, layout),
            "height": 32,
            "width": 32,
            "batch_size": 4,
            "learning_rate": 1e-3,
            "lora_base_model": "dit",
            "lora_rank": 4,
            "cache_path": str(folder / "cache"),
            "output_path": "unused",
        }
        return {k: v for k, v in {**base, **overrides}.items() if v is not None}

    return make


def exports(values: dict[str, Any], run: Path) -> list[Exported]:
    config = make_config({**values, "output_path": str(run)})
    record = record_of(run)
    return export_run(config, record, find_model(config, HUB))
