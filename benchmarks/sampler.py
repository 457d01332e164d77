"""Time and memory to the first 1,000 samples, against torch's RandomSampler.

    python benchmarks/sampler.py

Each size runs in a process of its own. RandomSampler makes a list of the whole epoch before it
gives the first sample, so it is measured at 10^6 and 10^7 only.
"""

import json
import sys
from itertools import islice

import report

OURS = (10**6, 10**9, 10**12)
TORCH = (10**6, 10**7)


def measure(kind: str, size: int) -> None:
    """Print seconds and memory of one sampler as JSON."""
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
    grown = report.peak_memory() - before
    print(json.dumps({"seconds": seconds, "bytes": grown}))


def main() -> None:
    """Measure every size and print the table."""
    rows = []
    for kind, sizes in (("ours", OURS), ("torch", TORCH)):
        for size in sizes:
            found = report.in_child(__file__, kind, str(size))
            rows.append(
                {
                    "sampler": kind,
                    "samples": f"{size:.0e}",
                    "seconds to the first 1000": round(found["seconds"], 4),
                    "MiB more memory": round(found["bytes"] / 2**20, 1),
                }
            )
    print(report.table(rows))
    report.write("sampler", {"rows": rows})


if __name__ == "__main__":
    measure(sys.argv[1], int(sys.argv[2])) if len(sys.argv) > 1 else main()
