"""The demo's model, its digits and its training, as the benchmarks use them."""

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from diffsynth_dagster.config import TrainingConfig
from diffsynth_dagster.config.recipe import read_recipe
from diffsynth_dagster.demo.digits import load_scans, write_new_digits, write_scans

ROOT = Path(__file__).parents[1]
BASE = ROOT / "recipes" / "demo_base"
MODEL: dict[str, Any] = {
    "family": "qwen_image",
    "model_paths": tuple(
        str(BASE / f"{name}.safetensors")
        for name in (
            "transformer/diffusion_pytorch_model",
            "text_encoder/model",
            "vae/diffusion_pytorch_model",
        )
    ),
    "tokenizer_path": str(BASE / "tokenizer"),
}
"""The parameters that name the demo's model."""
_WITHOUT: dict[str, Any] = {
    "customized_dataset": None,
    "customized_evaluation": None,
    "sample_prompts": (),
    "validation_metadata_path": None,
    "validation_steps": None,
}
"""The demo's pictures and measurements, left out; its data set is written before."""
_FEW = 16


def write_digits(folder: Path, tiny: bool) -> None:
    """Write the demo's data set; a few scans if `tiny`."""
    if not tiny:
        write_new_digits(folder)
        return
    scans = load_scans()
    write_scans(scans.where(np.arange(len(scans.index)) < _FEW), folder)


def training_of(digits: Path, work: Path, tiny: bool, **changes: Any) -> TrainingConfig:
    """The demo's training on a folder of digits, without pictures and measurements.

    Args:
        work: gets the store and the run folder.
        tiny: whether steps are of four pictures.
        changes: other parameters than the demo's.
    """
    paths = {
        **MODEL,
        "dataset_base_path": str(digits),
        "dataset_metadata_path": str(digits / "metadata.csv"),
        "cache_path": str(work / "store"),
        "output_path": str(work / "trained"),
    }
    size = {"batch_size": 4} if tiny else {}
    recipe = read_recipe(ROOT / "recipes" / "demo.yaml")
    return recipe.config.model_copy(update={**paths, **_WITHOUT, **size, **changes})


class Timed:
    """A function of a module, or method of a class, which counts the seconds that are spent in it
    while this is entered."""

    def __init__(self, module: Any, name: str) -> None:
        self._module, self._name = module, name
        self._original: Callable[..., Any] = getattr(module, name)
        self.seconds = 0.0

    def __enter__(self) -> "Timed":
        setattr(self._module, self._name, self)
        return self

    def __exit__(self, *_: object) -> None:
        setattr(self._module, self._name, self._original)

    def __get__(self, instance: Any, owner: type) -> Callable[..., Any]:
        """A method of an object, where the function is one of a class."""
        return self if instance is None else partial(self, instance)

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        """Call the function."""
        start = time.perf_counter()
        try:
            return self._original(*arguments, **named)
        finally:
            self.seconds += time.perf_counter() - start
