"""`python -m diffsynth_dagster.export FILE --to FORMAT`: convert a LoRA file for another tool."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from diffsynth_dagster.families import family_names
from diffsynth_dagster.formats import FORMATS
from diffsynth_dagster.run.guard import FailureGuard, PrintedFailures


def parser() -> argparse.ArgumentParser:
    """The parser of the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m diffsynth_dagster.export",
        description="Write a LoRA file, of this trainer or another tool, in the names of a tool.",
    )
    parser.add_argument("file", type=Path, help="the LoRA file")
    parser.add_argument("--to", required=True, choices=FORMATS, help="the format to write")
    parser.add_argument(
        "--output", type=Path, help="the file to write (peft: a folder); left out, beside FILE"
    )
    parser.add_argument(
        "--family",
        choices=family_names(),
        help="the model that it is for; left out, the file's header or its names say it",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line; returns the exit code."""
    with FailureGuard(PrintedFailures()) as guard:
        arguments = parser().parse_args(sys.argv[1:] if argv is None else argv)
        # Imported late: `--help` and wrong flags are answered without loading diffusers.
        from diffsynth_dagster.export.convert import convert

        print(convert(arguments.file, arguments.to, arguments.output, arguments.family))
    return guard.code


if __name__ == "__main__":
    sys.exit(main())
