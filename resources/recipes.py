"""Loads the recipes of a folder, and separates those that cannot be used."""

import os
import re
from dataclasses import dataclass
from pathlib import Path
from zoneinfo import ZoneInfo

import dagster as dg
from dagster._core.storage.tags import USER_EDITABLE_SYSTEM_TAGS
from dagster._utils.tags import is_private_system_tag_key, is_valid_tag_key

from diffsynth_dagster.config import Recipe, TrainingConfig, read_recipe
from diffsynth_dagster.config.entries import ModelEntry, mark_of_text, named_entries
from diffsynth_dagster.config.recipe import read_retrain, recipe_files
from diffsynth_dagster.config.retrain import Retrain
from diffsynth_dagster.config.validate import named_code
from diffsynth_dagster.dotted import find_dotted
from diffsynth_dagster.errors import ParameterError, UserError
from diffsynth_dagster.project import project_root
from diffsynth_dagster.run.warm_start import start_of
from resources.pools import pool_of

VARIABLE = "DIFFSYNTH_DAGSTER_RECIPES"


@dataclass(frozen=True)
class BrokenRecipe:
    """A recipe that cannot be used, and why. Its assets exist and fail with that reason, so that a
    mistake in one file is visible in the UI and does not affect other recipes."""

    name: str
    path: Path
    error: UserError

    @property
    def retrain(self) -> Retrain | None:
        """The recipe's `retrain`, if at least that can be read."""
        return _sound_retrain(self.path)


def recipes_folder() -> Path:
    """The folder that the environment variable names, else `recipes` in the project's root."""
    given = os.environ.get(VARIABLE)
    return Path(given) if given else project_root() / "recipes"


def identifier(text: str) -> str:
    """A text turned into a name that Dagster accepts: letters, digits and underscores."""
    return re.sub(r"[^A-Za-z0-9_]+", "_", text)


def load_recipes(folder: Path) -> tuple[list[Recipe], list[BrokenRecipe]]:
    """The sound and the broken recipes of a folder (not of its subfolders), each ordered by name.

    Raises:
        ParameterError: the folder does not exist.
    """
    if not folder.is_dir():
        raise ParameterError(
            "the folder of recipes does not exist",
            where=str(folder.absolute()),
            do="make one with `python -m diffsynth_dagster.new`, or name the folder that holds your recipes: "
            f"in {VARIABLE}, or as 'folder' of the component",
        )
    sound: list[Recipe] = []
    broken: list[BrokenRecipe] = []
    for name, paths in _named(folder).items():
        path = paths[0]
        try:
            _require_own_name(name, paths)
            recipe = read_recipe(path)
            _steps(recipe.config)  # raises if an entry of the model list is malformed
            for parameter, dotted in named_code(recipe.config).items():
                find_dotted(dotted, f"{path}: '{parameter}'")
            _check_retrain(recipe)
            pool_of(recipe.options)
            _check_tags(recipe)
        except UserError as error:
            broken.append(BrokenRecipe(name, path, _with_path(error, path)))
        except Exception as error:  # noqa: BLE001 - one recipe must not take the others down
            unforeseen = ParameterError(
                f"the recipe cannot be used: {type(error).__name__}: {error}",
                where=str(path),
                do="correct it, and tell the authors of this trainer",
            )
            broken.append(BrokenRecipe(name, path, unforeseen))
        else:
            sound.append(Recipe(name, path, recipe.config, recipe.options))
    # These compare recipes with each other, so they come after all are read.
    for find_broken in (_sharing_folder, _with_clashing_weights):
        found = find_broken(sound)
        broken += found
        names = {recipe.name for recipe in found}
        sound = [recipe for recipe in sound if recipe.name not in names]
    return sound, broken


def _with_path(error: UserError, path: Path) -> UserError:
    """The error with the recipe's path in its message."""
    if str(path) in str(error):
        return error
    where = f"{path}: {error.where}" if error.where else str(path)
    return ParameterError(error.what, where=where, do=error.do)


def _named(folder: Path) -> dict[str, list[Path]]:
    """Name of the assets and the job → the recipe files that lead to it."""
    named: dict[str, list[Path]] = {}
    for path in recipe_files(folder):
        name = identifier(path.stem)
        # `identifier` drops all other characters: names in Chinese, say, would all become the same.
        if not path.stem.isascii():
            name = f"{name.strip('_') or 'recipe'}_{mark_of_text(path.stem)}"
        named.setdefault(name, []).append(path)
    return named


def _require_own_name(name: str, paths: list[Path]) -> None:
    """Refuse recipes whose assets would have the same names as others: Dagster would mix their
    histories. Raises `ParameterError`."""
    if name == "weights" or name.startswith("weights__"):
        raise ParameterError(
            f"'{name}' is a name of the assets of weights",
            where=str(paths[0]),
            do="rename the recipe",
        )
    if len(paths) > 1:
        raise ParameterError(
            f"{' and '.join(p.name for p in paths)} would have the same assets, '{name}'",
            where=str(paths[0].parent),
            do="rename all but one of these recipes: their names must differ in letters, digits or '_'",
        )


def _with_clashing_weights(recipes: list[Recipe]) -> list[BrokenRecipe]:
    """Recipes with weights whose asset would have the same name as other weights. The first recipe
    keeps the name; the later ones are broken."""
    broken: list[BrokenRecipe] = []
    taken: dict[str, tuple[str, str]] = {}  # step name → (model entry, recipe)
    for recipe in recipes:
        named, clashes = dict(taken), list[tuple[str, str, str]]()
        for step, entry in _steps(recipe.config):
            text, first = named.setdefault(step, (entry.same, recipe.name))
            if text != entry.same:
                clashes.append((entry.same, text, first))
        if not clashes:
            taken = named
            continue
        text, other, first = clashes[0]
        error = ParameterError(
            f"the weights '{text}' would have the same asset as '{other}' of the recipe '{first}'",
            where=str(recipe.path),
            do="rename one of the files or folders: their names must differ in letters, digits or folders",
        )
        broken.append(BrokenRecipe(recipe.name, recipe.path, error))
    return broken


def _steps(config: TrainingConfig) -> list[tuple[str, ModelEntry]]:
    """(step name, entry) for each model that a config names."""
    entries = named_entries(config)
    return [(dg.AssetKey(["weights", *e.name]).to_python_identifier(), e) for e in entries]


def _sharing_folder(recipes: list[Recipe]) -> list[BrokenRecipe]:
    """Recipes that share a run folder, all of them as broken: each would take the checkpoints of
    the others for its own."""
    folders: dict[str, list[Recipe]] = {}
    for recipe in recipes:
        folders.setdefault(os.path.abspath(recipe.config.output_path), []).append(recipe)
    broken: list[BrokenRecipe] = []
    for sharing in (group for group in folders.values() if len(group) > 1):
        for recipe in sharing:
            others = ", ".join(f"'{other.name}'" for other in sharing if other is not recipe)
            error = ParameterError(
                f"'output_path' is also that of the recipe {others}",
                where=f"{recipe.path}: {recipe.config.output_path}",
                do="give each recipe a folder of its own",
            )
            broken.append(BrokenRecipe(recipe.name, recipe.path, error))
    return broken


def _check_times(retrain: Retrain, where: str) -> None:
    """Check the time zone and the cron of `retrain`. Raises `ParameterError`."""
    zone = retrain.timezone
    try:
        ZoneInfo(zone)
    # An unknown name, a malformed one, or a folder of the zone database such as "Europe".
    except (KeyError, ValueError, OSError):
        raise ParameterError(
            f"'timezone' = '{zone}' in 'retrain' is no time zone",
            where=where,
            do="name one like Europe/Berlin, Asia/Tokyo or UTC",
        ) from None
    if retrain.cron is None:
        return
    # Dagster parses cron expressions itself, so this accepts exactly what it accepts.
    try:
        dg.ScheduleDefinition(job_name="job", cron_schedule=retrain.cron, execution_timezone=zone)
    except dg.DagsterInvalidDefinitionError:
        raise ParameterError(
            f"'cron' = '{retrain.cron}' in 'retrain' is no cron expression",
            where=where,
            do='write it like "0 3 * * *": minute, hour, day of month, month, day of week',
        ) from None


def _check_tags(recipe: Recipe) -> None:
    """Refuse tags that Dagster would not accept. Raises `ParameterError`."""
    for name in recipe.options.tags:
        if not is_valid_tag_key(name):
            raise ParameterError(
                f"'tags' has '{name}', which is no name of a tag",
                where=str(recipe.path),
                do="write letters, digits, '_', '-', '.', at most 63 of them; one '/' may stand between two "
                "such parts",
            )
        if is_private_system_tag_key(name):
            raise ParameterError(
                f"'tags' has '{name}', which Dagster sets itself",
                where=str(recipe.path),
                do=f"leave it out; those that may be set are {', '.join(USER_EDITABLE_SYSTEM_TAGS)}",
            )


def _check_retrain(recipe: Recipe) -> None:
    """Check `retrain` against the rest of the recipe. Raises `ParameterError`."""
    retrain = recipe.options.retrain
    if retrain is None:
        return
    _check_times(retrain, str(recipe.path))
    if retrain.files and recipe.config.dataset_metadata_path is None:
        raise ParameterError(
            "'retrain' has 'files', and the recipe has no data set: it trains from encoded samples",
            where=str(recipe.path),
            do="give 'cron', with 'when: always' where nothing here makes the samples",
        )
    if retrain.files and recipe.config.customized_dataset is not None:
        raise ParameterError(
            "'retrain' has 'files', and 'customized_dataset' writes the files in each run",
            where=str(recipe.path),
            do="give 'cron'",
        )
    if retrain.warm_start and (recipe.config.encodes_only or start_of(recipe.config) is None):
        raise ParameterError(
            "'retrain' has 'warm_start', and the recipe does not train one model alone",
            where=str(recipe.path),
            do="leave it out: a training starts from one file",
        )


def _sound_retrain(path: Path) -> Retrain | None:
    """The `retrain` of a broken recipe; None if it has none, or a wrong one."""
    retrain = read_retrain(path)
    try:
        if retrain is not None:
            _check_times(retrain, str(path))
    except ParameterError:
        return None
    return retrain
