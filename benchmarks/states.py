"""What writing resumable states costs a training, and what is done around forward, backward and optimizer.

    python benchmarks/states.py
    python benchmarks/states.py tiny     a trial in seconds, of which nothing is written

The demo's model on larger pictures, in one process, with a state every 50 steps. Timed where it happens, in the run
that it is a part of: the time that a step waits for the copy of a state; and all that is done from
the first step to the last beside forward and backward passes, the norm of the gradients and the
optimizer: reading, reporting, the losses of the samples, states and the checkpoint.
"""

import shutil
import tempfile
from pathlib import Path
from typing import Any

import report
from accelerate.optimizer import AcceleratedOptimizer
from demo_runs import Timed, training_of, write_digits

from diffsynth_dagster.run.signals import StopSignal
from diffsynth_dagster.train import run
from diffsynth_dagster.training import optimizer_step, states
from diffsynth_dagster.training.parallel import Parallel

CASES = ((1, 384, 50), (4, 192, 50))
"""Pictures in a step (1 is the guide's default), their side (for steps of about 100 ms on two cores),
and how many steps a state comes after."""
TINY_CASES = ((1, 32, 4), (4, 16, 4))


def measure(work: Path, batch_size: int, side: int, every: int) -> list[dict[str, Any]]:
    """Train, and take the parts of the time."""
    config = training_of(
        work / "digits",
        work / f"{batch_size}",
        tiny=False,
        height=side,
        width=side,
        batch_size=batch_size,
        dataset_repeat=batch_size,
        num_epochs=1,
        state_steps=every,
    )
    with (
        Timed(states.States, "run") as written,
        Timed(optimizer_step, "differentiate") as differentiating,
        Timed(Parallel, "clip") as clipping,
        Timed(AcceleratedOptimizer, "step") as optimizer,
        Timed(AcceleratedOptimizer, "zero_grad") as clearing,
    ):
        record = run(config, StopSignal())
    assert record is not None
    whole = record.seconds
    parts = (differentiating, clipping, optimizer, clearing)
    computed = sum(part.seconds for part in parts)
    return [
        {
            "what": f"{record.steps} steps of {batch_size} pictures of {side} px, {whole / record.steps * 1000:.0f} ms each",
            "seconds": round(whole, 2),
            "part": "100%",
        },
        {
            "what": f"waiting for states, one in {every} steps",
            "seconds": round(written.seconds, 3),
            "part": f"{written.seconds / whole:.2%}",
        },
        {
            "what": "beside forward, backward and optimizer",
            "seconds": round(whole - computed, 3),
            "part": f"{(whole - computed) / whole:.2%}",
        },
    ]


def main(tiny: bool) -> dict[str, Any]:
    """Measure, and print the table."""
    work = Path(tempfile.mkdtemp(prefix="bench-states-"))
    try:
        write_digits(work / "digits", tiny)
        rows = [row for case in (TINY_CASES if tiny else CASES) for row in measure(work, *case)]
    finally:
        shutil.rmtree(work)
    print(report.table(rows))
    return {"rows": rows}


if __name__ == "__main__":
    found = report.command_line("states", main, __doc__)
