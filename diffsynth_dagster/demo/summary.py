"""`python -m diffsynth_dagster.demo.summary`: print the results of the demo,
`recipes/demo.yaml`."""

import sys
from pathlib import Path

from diffsynth_dagster.config import read_recipe
from diffsynth_dagster.errors import EXIT_USER_ERROR, OutputError, UserError
from diffsynth_dagster.run.record import read_record

RECIPE = Path("recipes/demo.yaml")
_LINES = {
    "eight and nine": "accuracy/eight_nine",
    "zero to seven": "accuracy/zero_to_seven",
}


def summary(recipe: Path = RECIPE) -> str:
    """The accuracies before and after the training, and the path of the exported LoRA.

    Raises:
        ParameterError: the recipe cannot be read.
        OutputError: the demo was not run, or did not finish.
    """
    config = read_recipe(recipe).config
    folder = Path(config.output_path)
    record = read_record(folder)
    exported = folder / "exports" / "diffusers" / "pytorch_lora_weights.safetensors"
    if record is None or not record.finished or not exported.is_file():
        raise OutputError("the demo was not run to its end", where=str(folder), do="`make demo`")
    # The recipe's `customized_evaluation` ran before the first step and after the last.
    lines = ["A classifier trained on real digits reads 20 samples of each digit:"]
    for title, name in _LINES.items():
        before, after = (record.evaluation[f"{when}/{name}"] for when in ("before", "after"))
        lines.append(f"  {title:15}  before {before:6.1%}   after {after:6.1%}")
    lines.append(f"The LoRA for diffusers: {exported}")
    lines.append(f"Before and after, to look at: {folder / 'samples'}")
    return "\n".join(lines)


def main() -> int:
    """Print the summary; returns the exit code."""
    try:
        print(summary())
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    return 0


if __name__ == "__main__":
    sys.exit(main())
