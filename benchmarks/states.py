"""What writing resumable states costs a training, and what is done around forward, backward and optimizer.

    python benchmarks/states.py

The demo's model on larger pictures, in one process, with a state every 50 steps. Timed where it happens, in the run
that it is a part of: the time that a step waits for the copy of a state; and all that is done from
the first step to the last beside forward and backward passes, the norm of the gradients and the
optimizer: reading, reporting, the losses of the samples, states and the checkpoint.
"""

import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import report
from accelerate.optimizer import AcceleratedOptimizer
from checks import DEMO, Timed
from in_dagster import WITHOUT

from diffsynth_dagster.config.recipe import read_recipe
from diffsynth_dagster.demo.digits import write_new_digits
from diffsynth_dagster.train import run
from diffsynth_dagster.training import states
from diffsynth_dagster.training.parallel import Parallel
from diffsynth_dagster.training.step import TrainingStep
from diffsynth_dagster.training.stop import StopSignal

EVERY = 50
CASES = ((1, 384), (4, 192))
"""Pictures in a step (1 is the guide's default), and their side: steps of about 100 ms on two cores."""


def measure(work: Path, batch_size: int, side: int) -> list[dict[str, Any]]:
    """Train, and take the parts of the time."""
    paths = {
        "dataset_base_path": str(work / "digits"),
        "dataset_metadata_path": str(work / "digits" / "metadata.csv"),
        "cache_path": str(work / "store"),
        "output_path": str(work / f"trained-{batch_size}"),
    }
    size = {"height": side, "width": side, "batch_size": batch_size}
    length = {"dataset_repeat": batch_size, "num_epochs": 1}
    config = read_recipe(DEMO).config.model_copy(
        update={**WITHOUT, **size, **length, **paths, "state_steps": EVERY}
    )
    with (
        Timed(states.States, "run") as written,
        Timed(TrainingStep, "forward") as forward,
        Timed(Parallel, "backward") as backward,
        Timed(Parallel, "clip") as clipping,
        Timed(AcceleratedOptimizer, "step") as optimizer,
        Timed(AcceleratedOptimizer, "zero_grad") as clearing,
    ):
        record = run(config, StopSignal())
    assert record is not None
    whole = record.seconds
    parts = (forward, backward, clipping, optimizer, clearing)
    computed = sum(part.seconds for part in parts)
    return [
        {
            "what": f"{record.steps} steps of {batch_size} pictures of {side} px, {whole / record.steps * 1000:.0f} ms each",
            "seconds": round(whole, 2),
            "part": "100%",
        },
        {
            "what": f"waiting for states, one in {EVERY} steps",
            "seconds": round(written.seconds, 3),
            "part": f"{written.seconds / whole:.2%}",
        },
        {
            "what": "beside forward, backward and optimizer",
            "seconds": round(whole - computed, 3),
            "part": f"{(whole - computed) / whole:.2%}",
        },
    ]


def main() -> None:
    """Measure, and print the table."""
    work = Path(tempfile.mkdtemp(prefix="bench-states-"))
    try:
        write_new_digits(work / "digits")
        rows = [row for case in CASES for row in measure(work, *case)]
    finally:
        shutil.rmtree(work)
    print(report.table(rows))
    report.write("states", {"rows": rows})


if __name__ == "__main__":
    sys.exit(main())
