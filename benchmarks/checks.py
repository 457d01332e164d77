"""What the checks cost: of encoding, of a training step, and of one sample of the published models.

    python benchmarks/checks.py
    python benchmarks/checks.py tiny     a trial in seconds, of which nothing is written

The checks are timed where they are called, in the same run that they are a part of: of what is encoded,
whether it is finite and its digest; of what a step reads, its digest. The demo's digits and model,
in one process.
"""

import csv
import shutil
import statistics
import tempfile
from pathlib import Path
from typing import Any

import report
import torch
from cache import config_of, encode
from demo_runs import Timed, training_of, write_digits
from step import SUBJECTS

from diffsynth_dagster.cache import encode as encoding
from diffsynth_dagster.cache import shards
from diffsynth_dagster.config import TrainingConfig
from diffsynth_dagster.run.signals import StopSignal
from diffsynth_dagster.train import run
from diffsynth_dagster.weights.hub import ModelHub
from diffsynth_dagster.weights.identify import find_model
from diffsynth_dagster.weights.load import is_finite

_REPEATS = 50


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


def step_row(config: TrainingConfig) -> dict[str, Any]:
    """The digests of what the steps of the demo's training read; its samples are in the store."""
    with Timed(shards, "tensor_digest") as digests:
        assert run(config, StopSignal()) is not None
    with (Path(config.output_path) / "metrics.csv").open() as file:
        steps = [float(line["seconds"]) for line in csv.DictReader(file)]
    return row(f"{len(steps)} steps of the demo", sum(steps), digests.seconds)


def sample_row(name: str, scale: str) -> dict[str, Any]:
    """The digest of one sample of a published model, as a step reads it."""
    shape = SUBJECTS[name].shapes[scale]
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


def weights_row(count: int) -> dict[str, Any]:
    """Whether weights are finite: once for each file that is read."""
    weights = torch.randn(count, dtype=torch.float32).to(torch.bfloat16)
    seconds, _ = report.timed(lambda: is_finite(weights))
    return {
        "weights": "bfloat16",
        "GiB": round(weights.nbytes / 2**30, 4),
        "seconds": round(seconds, 4),
    }


def main(tiny: bool) -> dict[str, Any]:
    """Measure all and print the tables."""
    work = Path(tempfile.mkdtemp(prefix="bench-checks-"))
    try:
        write_digits(work / "digits", tiny)
        length = {"dataset_repeat": 2, "num_epochs": 1}
        training = training_of(work / "digits", work, tiny, **length)
        parts = [encoding_row(config_of(work / "digits", work)), step_row(training)]
    finally:
        shutil.rmtree(work)
    samples = [sample_row(name, "tiny" if tiny else "full") for name in SUBJECTS]
    weights = weights_row(2**24 if tiny else 2**28)
    for rows in (parts, samples, [weights]):
        print(report.table(rows))
    return {"parts": parts, "samples": samples, "weights": weights}


if __name__ == "__main__":
    found = report.command_line("checks", main, __doc__)
