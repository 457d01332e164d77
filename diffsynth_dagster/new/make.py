"""Makes a recipe: looks at the data set, and writes what a project needs for it; all of that, or nothing."""

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
"""What Dagster needs in the project's root."""


@dataclass(frozen=True)
class Made:
    """A recipe that was written.

    Attributes:
        files: that were written, the recipe last.
    """

    found: Found
    config: TrainingConfig
    course: Course
    files: tuple[Path, ...]


def make_recipe(asked: Asked, template: Path) -> Made:
    """Look at the data set, and write the recipe and what else the project lacks.

    Raises:
        ParameterError: the name cannot be taken, or a value does not fit.
        MetadataError: the data set cannot be trained on.
        WeightsError: a model file that is named is not there, or one is lacking.
        OutputError: a file cannot be written.
    """
    from diffsynth_dagster.dry_run import look_at_models
    from diffsynth_dagster.preflight import check_config
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
    check_config(config, model)
    with facts_in(Path(config.cache_path)) as facts:
        found = look_at(config, model.family, facts)
        choices, course = choices_of(found, asked, config, options)
        changes = [*settings, *choices]
        config = config_of(changed(values, changes), asked.root)
        check_config(config, model)
        made_by = f"Made by `python -m diffsynth_dagster.new` from the template {template.stem}."
        data = asked.written(asked.data.base)
        text = edited(template.read_text(encoding="utf-8"), changes, made_by, data)
        assert _read(text, asked.root) == config, "the text says what was checked"
        texts = _lacking(asked.root, folder, options)
        texts[folder / f"{asked.name}.yaml"] = text
        _write_all(texts)
    return Made(found, config, course, tuple(texts))


def _require_free(name: str, folder: Path) -> None:
    """Refuse a name that no recipe can have, or that one has. Raises `ParameterError`."""
    if not _NAME.fullmatch(name) or name == "weights" or name.startswith("weights__"):
        raise ParameterError(
            f"'{name}' is no name of a recipe",
            where="NAME",
            do="give letters, digits, '_' or '-', such as my_style; 'weights' is taken",
        )
    for path in recipe_files(folder):
        if identifier(path.stem) == identifier(name):
            raise ParameterError(
                f"there is a recipe of this name: {path.name}",
                where=str(path),
                do="give another name, or remove that file",
            )


def _require_own_folder(config: TrainingConfig, folder: Path, root: Path) -> None:
    """Refuse a run folder that is that of another recipe. Raises `ParameterError`."""
    for other in load_recipes(folder)[0] if folder.is_dir() else ():
        if os.path.abspath(root / other.config.output_path) == config.output_path:
            raise ParameterError(
                f"the recipe '{other.name}' has the run folder that this one would have",
                where=f"output_path = {other.config.output_path}",
                do="give another name",
            )


def _read(text: str, root: Path) -> TrainingConfig:
    """The config of a recipe's text."""
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch, "recipe.yaml")
        path.write_text(text, encoding="utf-8")
        return config_of(read_values(path)[0], root)


def _lacking(root: Path, folder: Path, options: RecipeOptions) -> dict[Path, str]:
    """The files that a project lacks, with their texts; none where the recipes lie elsewhere."""
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
    """Write files; where one cannot be written, none is left. Raises `OutputError`."""
    with ExitStack() as undo:
        for path, text in texts.items():
            for above in reversed(path.parents):
                if not above.exists():
                    undo.callback(remove, above)
            write_text(path, text)
            undo.callback(remove, path)
        undo.pop_all()
