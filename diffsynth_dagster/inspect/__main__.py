"""`python -m diffsynth_dagster.inspect FILE`: where a weight file comes from."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from diffsynth_dagster.run.guard import FailureGuard, PrintedFailures


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m diffsynth_dagster.inspect",
        description="Say where a weight file comes from: a checkpoint, an export, or a file of another tool.",
    )
    parser.add_argument("file", type=Path, nargs="?", help="the weight file")
    parser.add_argument(
        "--run", type=Path, help="its run folder; left out, the one that the file lies in"
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--dataset",
        action="store_true",
        help="the rows that it was trained on, and what has changed since",
    )
    what.add_argument(
        "--diff", type=Path, nargs=2, metavar=("A", "B"), help="in what two files differ, and why"
    )
    what.add_argument(
        "--rebuild", type=Path, metavar="OUT.yaml", help="write the recipe that makes it again"
    )
    with FailureGuard(PrintedFailures()) as guard:
        given = parser.parse_args(sys.argv[1:] if argv is None else argv)
        if (given.file is None) == (given.diff is None) or (given.diff and given.run):
            parser.error("give one FILE, or --diff A B alone")
        for line in _lines(given):
            print(line)
    return guard.code


def _lines(given: argparse.Namespace) -> list[str]:
    """The lines to print. Each part is imported only when it is used, because some take seconds."""
    from diffsynth_dagster.inspect.subject import read_subject

    if given.diff is not None:
        from diffsynth_dagster.inspect.compare import compared

        return compared(*(read_subject(path) for path in given.diff))
    subject = read_subject(given.file, given.run)
    if given.dataset:
        from diffsynth_dagster.inspect.dataset import trained_on

        return trained_on(subject)
    if given.rebuild is not None:
        from diffsynth_dagster.inspect.rebuild import write_recipe

        return write_recipe(subject, given.rebuild)
    from diffsynth_dagster.inspect.describe import told

    return told(subject)


if __name__ == "__main__":
    sys.exit(main())
