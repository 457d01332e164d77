"""What the checks cost: of encoding, of a training step, and of one sample of the published models.

    python benchmarks/checks.py

The checks are timed where they are called, in the same run that they are a part of: of what is encoded,
whether it is finite and its digest; of what a step reads, its digest. The demo's digits and model,
in one process.
"""

import csv
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import report
import torch
from cache import config_of, encode
from step import SUBJECTS

from diffsynth_dagster.cache import encode as encoding
from diffsynth_dagster.cache import shards
from diffsynth_dagster.config import TrainingConfig
from diffsynth_dagster.demo.digits import write_new_digits
from diffsynth_dagster.train import main as train
from diffsynth_dagster.weights.hub import ModelHub
from diffsynth_dagster.weights.identify import find_model
from diffsynth_dagster.weights.load import is_finite

ROOT = Path(__file__).parents[1]
DEMO = ROOT / "recipes" / "demo.yaml"
_REPEATS = 50


class Timed:
    """A function of a module, or method of a class, which counts the seconds that are spent in it while this is entered."""

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

    def __call__(self, *arguments: Any) -> Any:
        """Call the function."""
        start = time.perf_counter()
        try:
            return self._original(*arguments)
        finally:
            self.seconds += time.perf_counter() - start


def row(what: str, whole: float, checks: float) -> dict[str, Any]:
    """A line of the table."""
    return {
        "what": what,
        "seconds": round(whole, 3),
        "of these, checks": round(checks, 4),
        "part": f"{checks / whole:.2%}",
    }


def encoding_row(config: TrainingConfig) -> dict[str, Any]:
    """The checks of what is encoded, and the digests that are written with it."""
    found = find_model(config, ModelHub(Path("models"), skip_download=True))
    with Timed(encoding, "_require_finite") as finite, Timed(shards, "index_row") as digests:
        seconds, encoded = report.timed(lambda: encode(config, found))
    assert encoded > 0
    return row(f"encoding {encoded} digits", seconds, finite.seconds + digests.seconds)


def step_row(data: Path, work: Path) -> dict[str, Any]:
    """The digests of what the steps of the demo's training read."""
    paths = {
        "dataset_base_path": data,
        "dataset_metadata_path": data / "metadata.csv",
        "cache_path": work / "store",
        "output_path": work / "trained",
    }
    flags = [f"--{name}={path}" for name, path in paths.items()]
    with Timed(shards, "tensor_digest") as digests:
        code = train(["--recipe", str(DEMO), "--dataset_repeat=2", "--num_epochs=1", *flags])
    assert code == 0
    with (work / "trained" / "metrics.csv").open() as file:
        steps = [float(line["seconds"]) for line in csv.DictReader(file)]
    return row(f"{len(steps)} steps of the demo", sum(steps), digests.seconds)


def sample_row(name: str) -> dict[str, Any]:
    """The digest of one sample of a published model, as a step reads it."""
    shape = SUBJECTS[name].shapes["full"]
    tensors = [torch.randn(size, dtype=torch.float32) for size in (shape.latents, shape.text)]
    size = sum(tensor.nbytes for tensor in tensors)
    seconds = [
        report.timed(lambda: [shards.tensor_digest(t) for t in tensors])[0] for _ in range(_REPEATS)
    ]
    return {
        "sample": name,
        "MiB": round(size / 2**20, 2),
        "digest (ms)": round(statistics.median(seconds) * 1e3, 2),
    }


def weights_row() -> dict[str, Any]:
    """Whether weights are finite: once for each file that is read."""
    weights = torch.randn(2**28, dtype=torch.float32).to(torch.bfloat16)
    seconds, _ = report.timed(lambda: is_finite(weights))
    return {
        "weights": "bfloat16",
        "GiB": round(weights.nbytes / 2**30, 2),
        "seconds": round(seconds, 2),
    }


def main() -> None:
    """Measure all and print the tables."""
    work = Path(tempfile.mkdtemp(prefix="bench-checks-"))
    try:
        write_new_digits(work / "digits")
        config = config_of(work / "digits", work)
        parts = [encoding_row(config), step_row(work / "digits", work)]
    finally:
        shutil.rmtree(work)
    samples = [sample_row(name) for name in SUBJECTS]
    weights = weights_row()
    for rows in (parts, samples, [weights]):
        print(report.table(rows))
    report.write("checks", {"parts": parts, "samples": samples, "weights": weights})


if __name__ == "__main__":
    sys.exit(main())
