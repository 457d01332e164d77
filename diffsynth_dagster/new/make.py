"""Make a recipe: check the data set, then write the recipe and what else the project lacks.

Either all files are written or none.
"""

import os
import re
import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from diffsynth_dagster.config import TrainingConfig
from diffsynth_dagster.config.recipe import RecipeOptions, read_values, recipe_files
from diffsynth_dagster.errors import ParameterError
from diffsynth_dagster.files import remove, write_text
from diffsynth_dagster.new.data import Found, facts_in, look_at
from diffsynth_dagster.new.recipe import (
    Asked,
    Course,
    changed,
    choices_of,
    config_of,
    settings_of,
)
from diffsynth_dagster.new.template import edited
from diffsynth_dagster.project import own_files
from resources import identifier, load_recipes, recipes_folder

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")
_PROJECT = ("workspace.yaml", "dagster_home/dagster.yaml")
"""Files that Dagster needs in the root of a project."""


@dataclass(frozen=True)
class Made:
    """A recipe that was written.

    Attributes:
        files: all files that were written; the recipe is the last.
    """

    found: Found
    config: TrainingConfig
    course: Course
    files: tuple[Path, ...]


def make_recipe(asked: Asked, template: Path) -> Made:
    """Check the data set, and write the recipe and what else the project lacks.

    Raises:
        ParameterError: the name is invalid or taken, or a parameter is invalid.
        MetadataError: the data set cannot be trained on.
        WeightsError: a model file of `asked.models` does not exist, or a needed one is missing.
        OutputError: a file cannot be written.
    """
    # Imported here because these import torch.
    from diffsynth_dagster.plan import check_plan
    from diffsynth_dagster.training.dry_run import look_at_models
    from diffsynth_dagster.training.overlap import refuse_overlap
    from diffsynth_dagster.weights.identify import guess_model

    folder = recipes_folder().absolute()
    _require_free(asked.name, folder)
    values, options = read_values(template)
    settings = settings_of(asked)
    config = config_of(changed(values, settings), asked.root)
    _require_own_folder(config, folder, asked.root)
    if asked.models:
        look_at_models(config)
    model = guess_model(config)
    # Cheap checks first: looking at the data set may take long.
    check_plan(config, model)
    refuse_overlap(config)
    with facts_in(Path(config.cache_path)) as facts:
        found = look_at(config, model.family, facts)
        choices, course = choices_of(found, asked, config, options)
        changes = [*settings, *choices]
        config = config_of(changed(values, changes), asked.root)
        check_plan(config, model)  # again, with the values that follow from the data set
        made_by = f"Made by `python -m diffsynth_dagster.new` from the template {template.stem}."
        data = asked.written(asked.data.base)
        text = edited(template.read_text(encoding="utf-8"), changes, made_by, data)
        assert _read(text, asked.root) == config, "the text says what was checked"
        texts = _missing_files(asked.root, folder, options)
        texts[folder / f"{asked.name}.yaml"] = text
        _write_all(texts)
    return Made(found, config, course, tuple(texts))


def _require_free(name: str, folder: Path) -> None:
    """Refuse a name that is invalid or taken. Raises `ParameterError`."""
    # The assets of model files have names that start with "weights".
    if not _NAME.fullmatch(name) or name == "weights" or name.startswith("weights__"):
        raise ParameterError(
            f"'{name}' is no name of a recipe",
            where="NAME",
            do="give letters, digits, '_' or '-', such as my_style; 'weights' is taken",
        )
    for path in recipe_files(folder):
        # Dagster's names have `_` for `-`, so a-b and a_b would be the same job.
        if identifier(path.stem) == identifier(name):
            raise ParameterError(
                f"there is a recipe of this name: {path.name}",
                where=str(path),
                do="give another name, or remove that file",
            )


def _require_own_folder(config: TrainingConfig, folder: Path, root: Path) -> None:
    """Refuse a run folder that belongs to another recipe. Raises `ParameterError`."""
    for other in load_recipes(folder)[0] if folder.is_dir() else ():
        if os.path.abspath(root / other.config.output_path) == config.output_path:
            raise ParameterError(
                f"the recipe '{other.name}' has the run folder that this one would have",
                where=f"output_path = {other.config.output_path}",
                do="give another name",
            )


def _read(text: str, root: Path) -> TrainingConfig:
    """Parse the text of a recipe."""
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch, "recipe.yaml")
        path.write_text(text, encoding="utf-8")
        return config_of(read_values(path)[0], root)


def _missing_files(root: Path, folder: Path, options: RecipeOptions) -> dict[Path, str]:
    """Path → text of files that the project needs and does not have; none if the recipes are not in
    the project's root."""
    if folder != root / "recipes":
        return {}
    names = [*_PROJECT, *filter(None, [options.accelerate_config])]
    files = {root / name: own_files() / name for name in names}
    return {
        path: source.read_text(encoding="utf-8")
        for path, source in files.items()
        if not path.exists()
    }


def _write_all(texts: Mapping[Path, str]) -> None:
    """Write all files, or none if one cannot be written. Raises `OutputError`."""
    with ExitStack() as undo:
        for path, text in texts.items():
            # Folders that do not exist yet are removed again as well, the innermost first.
            for above in reversed(path.parents):
                if not above.exists():
                    undo.callback(remove, above)
            write_text(path, text)
            undo.callback(remove, path)
        undo.pop_all()  # all are written: forget the callbacks
