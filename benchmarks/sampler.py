"""Time and memory to the first 1,000 samples, against torch's RandomSampler.

    python benchmarks/sampler.py
    python benchmarks/sampler.py tiny    a trial in seconds, of which nothing is written

Each size runs in a process of its own. RandomSampler makes a list of the whole epoch before it
gives the first sample, so it is measured at 10^6 and 10^7 only.
"""

from itertools import islice
from typing import Any

import report

OURS = (10**6, 10**9, 10**12)
TORCH = (10**6, 10**7)
TINY = (20_000, 30_000)


def measure(kind: str, size: int) -> tuple[float, int]:
    """Seconds and bytes of memory of one sampler."""
    if kind == "ours":
        from diffsynth_dagster.data.order import StepOrder

        before = report.peak_memory()

        def first() -> int:
            order = StepOrder([size], repeat=1, batch_size=1, slots=1, seed=0)
            return len([order.step(step) for step in range(1000)])

    else:
        from torch.utils.data import RandomSampler

        before = report.peak_memory()

        def first() -> int:
            return len(list(islice(RandomSampler(range(size)), 1000)))

    seconds, count = report.timed(first)
    assert count == 1000
    return seconds, report.peak_memory() - before


def main(tiny: bool) -> dict[str, Any]:
    """Measure every size and print the table."""
    rows: list[dict[str, Any]] = []
    for kind, sizes in (("ours", OURS), ("torch", TORCH)):
        for size in TINY if tiny else sizes:
            seconds, grown = report.alone(measure, kind, size, tiny=tiny)
            rows.append(
                {
                    "sampler": kind,
                    "samples": f"{size:.0e}",
                    "seconds to the first 1000": round(seconds, 4),
                    "MiB more memory": round(grown / 2**20, 1),
                }
            )
    print(report.table(rows))
    return {"rows": rows}


if __name__ == "__main__":
    found = report.command_line("sampler", main, __doc__)
