"""`python -m diffsynth_dagster.report FOLDER`: write the report of a run folder anew."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from diffsynth_dagster.run.guard import FailureGuard, PrintedFailures


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m diffsynth_dagster.report",
        description="Write report.html of a run folder anew: what came of its training, in one file.",
    )
    parser.add_argument("folder", type=Path, help="the run folder (output_path), or one in older/")
    with FailureGuard(PrintedFailures()) as guard:
        folder: Path = parser.parse_args(sys.argv[1:] if argv is None else argv).folder
        # Imported late: `--help` is answered without loading diffusers.
        from diffsynth_dagster.report.page import write_report
        from diffsynth_dagster.run.record import require_record

        print(write_report(folder, require_record(folder)))
    return guard.code


if __name__ == "__main__":
    sys.exit(main())
