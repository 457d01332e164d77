"""`python -m diffsynth_dagster.check [FOLDER]`: check all recipes of a folder, as a step of CI.

It needs neither model files nor data: it makes the checks of the code location and of
`--dry_run --no_files`. The exit code is 0 if all recipes can be used, 1 if one cannot, and 2 if
there is no such folder.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from diffsynth_dagster.config import Recipe
from diffsynth_dagster.errors import EXIT_USER_ERROR, UserError
from resources import BrokenRecipe, load_recipes, recipes_folder


def main(arguments: Sequence[str] | None = None) -> int:
    """Check a folder of recipes, print the mistakes of each, and return the exit code.

    Args:
        arguments: arguments of the command line; left out: those of the process.
    """
    parser = argparse.ArgumentParser(prog="python -m diffsynth_dagster.check", description=__doc__)
    parser.add_argument(
        "folder", nargs="?", type=Path, help="left out: that of DIFFSYNTH_DAGSTER_RECIPES"
    )
    folder: Path = parser.parse_args(arguments).folder or recipes_folder()
    try:
        sound, broken = load_recipes(folder)
    except UserError as error:
        print(error, file=sys.stderr)
        return EXIT_USER_ERROR
    refused = sorted([*broken, *_refused(sound)], key=lambda recipe: recipe.path)
    for recipe in refused:
        print(f"{recipe.path.name}: {recipe.error}")
    count = len(sound) + len(broken)
    print(f"{count - len(refused)} of {count} recipes in {folder} can be used")
    return 1 if refused else 0


def _refused(recipes: Sequence[Recipe]) -> Iterator[BrokenRecipe]:
    """The recipes that load but whose training would be refused before it reads a file."""
    # Only now: these import torch.
    from diffsynth_dagster.dry_run import make_plan
    from diffsynth_dagster.training.overlap import refuse_own_recipe

    for recipe in recipes:
        try:
            refuse_own_recipe(recipe.config, recipe.path)
            make_plan(recipe.config)
        except UserError as error:
            yield BrokenRecipe(recipe.name, recipe.path, error)


if __name__ == "__main__":
    sys.exit(main())
