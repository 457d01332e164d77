"""`python -m diffsynth_dagster.new NAME --family … --data FOLDER`: write a recipe for your data
set.

It checks every row and every file of the data set, and reads no weights. Comments in the recipe say
what it chose and why. In an empty folder it also writes `workspace.yaml` and
`dagster_home/dagster.yaml`. If it fails, it leaves no files behind. The exit code is 0 if the
recipe was written, 2 if not.
"""

import argparse
import os
import shlex
import shutil
import sys
from collections.abc import Iterator, Sequence
from glob import glob
from pathlib import Path

from diffsynth_dagster.config.recipe import read_values
from diffsynth_dagster.new.data import find_data
from diffsynth_dagster.new.make import Made, make_recipe
from diffsynth_dagster.new.recipe import Asked
from diffsynth_dagster.new.template import PLAIN, find_template, plain_template, templates
from diffsynth_dagster.project import project_root
from diffsynth_dagster.run.guard import FailureGuard, failure_reporter
from resources import identifier
from resources.recipes import VARIABLE


def parser() -> argparse.ArgumentParser:
    """The flags of the command."""
    flags = argparse.ArgumentParser(
        prog="python -m diffsynth_dagster.new", description=__doc__ and __doc__.partition(": ")[2]
    )
    flags.add_argument(
        "name", nargs="?", metavar="NAME", help="of the recipe: letters, digits, _, -"
    )
    which = flags.add_mutually_exclusive_group()
    which.add_argument("--family", help=f"its plain LoRA: {', '.join(PLAIN)}")
    which.add_argument("--template", metavar="TEMPLATE", help="any other template: see --list")
    flags.add_argument(
        "--data",
        type=Path,
        metavar="FOLDER",
        help="pictures or clips, each with its caption beside it (cat.txt for cat.jpg), or with a "
        "metadata table in the folder; or the table itself",
    )
    flags.add_argument("--trigger", metavar="WORD", help="put before every caption: caption_prefix")
    flags.add_argument(
        "--models",
        nargs="+",
        default=[],
        metavar="PATH",
        help="files or folders of all models that are needed, on your disk, in place of those that are "
        "downloaded",
    )
    flags.add_argument("--list", action="store_true", help="print the templates")
    return flags


def main(arguments: Sequence[str] | None = None) -> int:
    """Write a recipe, print what was found and what to do next, and return the exit code.

    Args:
        arguments: of the command line; `sys.argv[1:]` if left out.
    """
    flags = parser()
    given = flags.parse_args(arguments)
    if given.list:
        for name, path in templates().items():
            print(f"{name:32} {read_values(path)[1].description}")
        return 0
    if given.name is None or given.data is None or not (given.family or given.template):
        flags.error("give a NAME, --data, and --family or --template")
    with FailureGuard(failure_reporter()) as guard:
        template = plain_template(given.family) if given.family else find_template(given.template)
        # If the environment sets the folder of recipes, paths start from the working directory.
        root = Path.cwd() if os.environ.get(VARIABLE) else project_root()
        models = tuple(os.path.abspath(path) for path in given.models)
        asked = Asked(given.name, root, find_data(given.data), models, given.trigger)
        made = make_recipe(asked, template)
        for line in (*_report(asked, made), "", *_next_steps(asked, made)):
            print(line)
    return guard.code


def _report(asked: Asked, made: Made) -> Iterator[str]:
    """Lines about what was found and written."""
    found, course = made.found, made.course
    where = asked.written(asked.data.table or asked.data.base)
    yield f"{where}: {found.summary}; {found.described}"
    for text in (*found.warnings, *_missing_models(asked, made)):
        yield f"warning: {text}"
    for path in made.files:
        yield f"wrote {asked.written(path)}"
    held_out = f", {course.held_out} held out" if course.held_out else ""
    yield (
        f"{course.steps} steps, about {course.visits} visits of each sample{held_out}; "
        f"a checkpoint every {course.save_steps}; "
        f"{len(made.config.sample_prompts) or 'no'} sample prompts"
    )


def _missing_models(asked: Asked, made: Made) -> Iterator[str]:
    """Warnings about model files of the template that do not exist. The user must provide these."""
    for path in () if asked.models else made.config.model_paths:
        if isinstance(path, str) and not glob(path):
            yield f"{asked.written(path)} is not there: put the file there, or correct model_paths"


def _next_steps(asked: Asked, made: Made) -> Iterator[str]:
    """The commands to run next."""
    recipe = shlex.quote(asked.written(made.files[-1]))
    job = f"train_{identifier(asked.name)}"
    python, dagster, accelerate = (
        _command(name, asked.root) for name in (Path(sys.executable).name, "dagster", "accelerate")
    )
    if Path.cwd() != asked.root:
        yield f"cd {shlex.quote(str(asked.root))}"
    yield "Look at what it would do:"
    yield f"  {python} -m diffsynth_dagster.train --recipe {recipe} --dry_run"
    yield "Train, in one of three ways:"
    if (asked.root / "dagster_home").is_dir():
        yield "  export DAGSTER_HOME=$PWD/dagster_home"
    yield f"  {dagster} job execute -m diffsynth_dagster.definitions -j {job}"
    yield (
        f"  {dagster} dev  (Jobs, {job}, Launchpad; where it runs already, "
        'click "Reload definitions" first)'
    )
    yield f"  {accelerate} launch --quiet -m diffsynth_dagster.train --recipe {recipe}"


def _command(name: str, root: Path) -> str:
    """How to call a command of this Python's environment from the root, quoted for a shell."""
    path = Path(sys.executable).parent / name
    if shutil.which(name) == str(path):  # the environment is active
        return name
    return shlex.quote(os.path.relpath(path, root) if path.is_relative_to(root) else str(path))


if __name__ == "__main__":
    sys.exit(main())
