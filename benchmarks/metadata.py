"""Checks the structure of a large csv table, against a pandas loop over its rows.

    python benchmarks/metadata.py                    1,000,000 rows; pandas over 100,000
    python benchmarks/metadata.py --rows 10000000    the peak memory of a large one
    python benchmarks/metadata.py tiny               a trial in seconds, of which nothing is written

Needs the extra `bench`. Every part runs in a process of its own, whose peak memory is its own, and
takes the best of three times.
"""

import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import report

PANDAS_ROWS = 100_000
LIMIT_GIB = 4.0
RATIO_ROWS, LEAST_RATIO = 1_000_000, 100
REPEATS = 3
Part = Callable[[Path], dict[str, Any]]


def write_table(path: Path, rows: int) -> None:
    """A csv of images and captions: one in ten quoted with a comma, one in a hundred with a
    newline."""
    subjects = ("a red house", "a cat, asleep", "two boats\non a lake", "a street at night")
    with path.open("w", encoding="utf-8") as file:
        file.write("image,prompt\n")
        for start in range(0, rows, 10_000):
            lines: list[str] = []
            for i in range(start, min(start + 10_000, rows)):
                kind = 2 if i % 100 == 0 else 1 if i % 10 == 0 else i % 2 * 3
                caption = f"{subjects[kind]} seen from the hill above the village number {i}"
                quoted = f'"{caption}"' if kind in (1, 2) else caption
                lines.append(f"images/{i % 1000:03}/{i:08}.jpg,{quoted}\n")
            file.writelines(lines)


def check(path: Path) -> dict[str, Any]:
    """Our structure check: status and message of every row."""
    from diffsynth_dagster.data.columns import Input
    from diffsynth_dagster.data.table.read import read_table
    from diffsynth_dagster.data.table.values import check_structure

    inputs = (Input("prompt", "text"), Input("image", "image"))
    start = time.perf_counter()
    frame = check_structure(read_table(path, "utf-8", inputs), inputs, str(path))
    seconds = time.perf_counter() - start
    assert (frame["status"] == "ok").all()
    return {"rows": frame.height, "seconds": seconds}


def pandas_loop(path: Path) -> dict[str, Any]:
    """The rows as dictionaries, which is all that is done with them."""
    try:
        import pandas as pd
    except ImportError:
        raise SystemExit("pandas is not installed: pip install pandas") from None

    start = time.perf_counter()
    df = pd.read_csv(path)
    rows = [df.iloc[i].to_dict() for i in range(len(df))]
    return {"rows": len(rows), "seconds": time.perf_counter() - start}


def measured(part: Part, path: Path, repeats: int) -> dict[str, Any]:
    """The best of several times: rows, seconds, rows_per_s and peak_gib of this process."""
    best = min((part(path) for _ in range(repeats)), key=lambda run: run["seconds"])
    peak = report.peak_memory() / 1024**3
    return {**best, "rows_per_s": best["rows"] / best["seconds"], "peak_gib": peak}


def main(tiny: bool, rows: int = 1_000_000) -> dict[str, Any]:
    """Measure both and print the table."""
    pandas_rows, rows = (2_000, 20_000) if tiny else (PANDAS_ROWS, rows)
    repeats = 1 if tiny else REPEATS
    with tempfile.TemporaryDirectory() as folder:
        small, large = Path(folder) / "small.csv", Path(folder) / "large.csv"
        write_table(small, pandas_rows)
        write_table(large, rows)
        size = large.stat().st_size / 1024**3
        runs = {
            "check_structure": report.alone(measured, check, large, repeats, tiny=tiny),
            "pandas loop": report.alone(measured, pandas_loop, small, repeats, tiny=tiny),
        }
    ratio = runs["check_structure"]["rows_per_s"] / runs["pandas loop"]["rows_per_s"]
    print(f"{'':16} {'rows':>12} {'seconds':>9} {'rows/s':>12} {'peak GiB':>9}")
    for name, run in runs.items():
        print(
            f"{name:16} {run['rows']:12,} {run['seconds']:9.2f} {run['rows_per_s']:12,.0f}"
            f" {run['peak_gib']:9.2f}"
        )
    print(f"{ratio:.0f} times as many rows per second; the table is {size:.2f} GiB")
    return {"table_gib": size, "ratio": ratio, "runs": runs}


def require_promised(found: dict[str, Any]) -> None:
    """Exit with a message where a measurement misses what is promised."""
    checked = found["runs"]["check_structure"]
    if checked["rows"] <= RATIO_ROWS and found["ratio"] < LEAST_RATIO:
        sys.exit(f"missed: at least {LEAST_RATIO} times as many rows per second")
    if checked["peak_gib"] >= LIMIT_GIB:
        sys.exit(f"missed: less than {LIMIT_GIB:g} GiB")


if __name__ == "__main__":
    parser = report.parser(__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    options = parser.parse_args()
    found = main(options.scale == "tiny", options.rows)
    if options.scale == "full":
        report.write(f"metadata_{options.rows}", found)
        require_promised(found)
