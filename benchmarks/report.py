"""What the benchmarks share: their command line, a process measured alone, a result written down.

    python benchmarks/<name>.py         measures, prints, and writes to benchmarks/results/
    python benchmarks/<name>.py tiny    does the same in seconds, with numbers too small to mean anything

`make test` does the second with each of them, so that no benchmark stops working unnoticed.
"""

import argparse
import json
import multiprocessing
import os
import platform
import resource
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

RESULTS = Path(__file__).parent / "results"
_Result = TypeVar("_Result")


def peak_memory() -> int:
    """Most memory that this process has used, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds that `work` takes, and what it returns."""
    start = time.perf_counter()
    result = work()
    return time.perf_counter() - start, result


def alone(work: Callable[..., _Result], *arguments: Any, tiny: bool = False) -> _Result:
    """Call a function in a process of its own, whose peak memory is that of the function.

    Args:
        work: a function of a module.
        tiny: call it in this process, where nothing is imported again.
    """
    if tiny:
        return work(*arguments)
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        return process.submit(work, *arguments).result()


def table(rows: list[dict[str, Any]]) -> str:
    """Rows of equal keys as aligned text."""
    columns = list(rows[0])
    cells = [columns, *([str(row[c]) for c in columns] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    return "\n".join(
        "  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) for line in cells
    )


def parser(doc: str | None, scale: str = "full") -> argparse.ArgumentParser:
    """The command line of a benchmark, whose first argument is its scale.

    Args:
        doc: the docstring of its module.
        scale: where none is named.
    """
    made = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    text = "tiny: a trial in seconds, of which nothing is written (default: %(default)s)"
    made.add_argument("scale", nargs="?", choices=("full", "tiny"), default=scale, help=text)
    return made


def command_line(
    name: str, main: Callable[[bool], dict[str, Any]], doc: str | None
) -> dict[str, Any]:
    """Run a benchmark that has no other arguments; write down what it measures at full scale.

    Args:
        main: measures at a scale (whether it is tiny), prints, and returns the result.
    """
    tiny = parser(doc).parse_args().scale == "tiny"
    result = main(tiny)
    if not tiny:
        write(name, result)
    return result


def write(name: str, result: dict[str, Any]) -> Path:
    """Write a result beside the machine it was measured on, under benchmarks/results/."""
    RESULTS.mkdir(exist_ok=True)
    machine = {"python": platform.python_version(), "cores": os.cpu_count()}
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({"machine": machine, **result}, indent=2) + "\n")
    return path
