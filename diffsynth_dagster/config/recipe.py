"""Recipes: a recipe is one flat YAML file with the parameters of a training."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import yaml
from pydantic import BaseModel, ConfigDict, Field, field_validator

from diffsynth_dagster.config.parameters import TrainingConfig
from diffsynth_dagster.config.recipe_yaml import load_yaml
from diffsynth_dagster.config.retrain import Retrain, as_retrain, refuse_schedule
from diffsynth_dagster.config.unsupported import refuse_unsupported
from diffsynth_dagster.config.validate import as_key, read_config, refuse_unknown, validated
from diffsynth_dagster.errors import ParameterError

PRIORITY, MAX_RUNTIME = "dagster/priority", "dagster/max_runtime"
"""Tags that Dagster reads as numbers. It silently ignores a value that is not a number."""


class RecipeOptions(BaseModel):
    """Keys of a recipe that say how it is run, not what is trained."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    description: str = Field("", description="What the training is for.")
    retrain: Retrain | None = Field(None, description="When it is trained again automatically.")
    num_processes: int | None = Field(
        None, ge=1, description="Number of training processes. Left out: accelerate's own choice."
    )
    gpus: int | None = Field(
        None, ge=1, description="How many GPUs of its pool it uses. Left out: all of them."
    )
    pool: str | None = Field(None, description="Pool whose GPUs it uses. Left out: the first pool.")
    retries: int = Field(
        2,
        ge=0,
        description="How often Dagster restarts the processes after a crash; they resume from the newest "
        "state. A user's mistake is never retried.",
    )
    promote_margin: float = Field(
        0.05,
        ge=0,
        allow_inf_nan=False,
        description="How much worse than the promoted export a new one may be and still be promoted, as "
        "a fraction of its loss.",
    )
    promote_keep: int = Field(
        3,
        ge=1,
        description="How many of the newest promoted versions are kept, with the current one.",
    )
    accelerate_config: str | None = Field(
        None, description="Configuration file for `accelerate launch --config_file`."
    )
    tags: Mapping[str, str] = Field(
        {},
        description="Tags of the runs of the job, such as dagster/priority (whole number, the higher "
        "the sooner) and dagster/max_runtime (seconds after which a run is ended).",
    )

    @field_validator("tags", mode="before")
    @classmethod
    def _as_text(cls, tags: object) -> object:
        """Numbers as text, since Dagster's tags are texts. Raises `ValueError`."""
        if not isinstance(tags, Mapping):
            raise ValueError("it must map texts to texts, one `name: value` in each line")
        texts: dict[object, object] = {}
        for name, value in cast(Mapping[object, object], tags).items():
            if isinstance(value, bool) or not isinstance(value, int | float | str):
                raise ValueError(f"the value of {name} must be a text: write it in quotes")
            texts[name] = str(value)
        return texts

    @field_validator("tags")
    @classmethod
    def _with_numbers(cls, tags: Mapping[str, str]) -> Mapping[str, str]:
        """Checks the tags that Dagster reads as numbers. Raises `ValueError`."""
        priority, runtime = tags.get(PRIORITY), tags.get(MAX_RUNTIME)
        if priority is not None and not _is_number(priority, int):
            raise ValueError(f"{PRIORITY} must be a whole number, such as 5")
        if runtime is not None and not (_is_number(runtime, float) and float(runtime) > 0):
            raise ValueError(f"{MAX_RUNTIME} must be a number of seconds above 0, such as 3600")
        return tags


def _is_number(text: str, kind: type[int] | type[float]) -> bool:
    try:
        return math.isfinite(kind(text))
    except ValueError:
        return False


@dataclass(frozen=True)
class Recipe:
    """One training.

    Attributes:
        name: the file's name without its extension, or what `load_recipes` made of it.
        path: the file.
        config: the parameters.
        options: how it is run.
    """

    name: str
    path: Path
    config: TrainingConfig
    options: RecipeOptions


def read_values(path: Path) -> tuple[dict[str, Any], RecipeOptions]:
    """The parameters in a recipe, of which only the names are checked, and its options.

    Raises:
        ParameterError: the file is not a flat mapping, has an unknown key, or names a model that is
            not supported; or see `load_yaml`.
    """
    where, loaded = str(path), load_yaml(path)
    if not isinstance(loaded, dict):
        raise ParameterError(
            "the recipe is not a mapping of parameters to values",
            where=where,
            do="write one `name: value` in each line",
        )
    values = {str(key): value for key, value in cast(dict[Any, Any], loaded).items()}
    refuse_unsupported(values, where)
    refuse_schedule(values, where)
    known = {**TrainingConfig.model_fields, **RecipeOptions.model_fields}
    for name in values:
        if name not in known:
            refuse_unknown(name, known, where, as_key)
    options = {name: values.pop(name) for name in RecipeOptions.model_fields if name in values}
    # Read first, for messages that name the keys inside of `retrain`.
    if options.get("retrain") is not None:
        options["retrain"] = as_retrain(options["retrain"], where)
    return values, validated(RecipeOptions, options, where)


def read_retrain(path: Path) -> Retrain | None:
    """The `retrain` of a recipe, even if something else in the recipe is wrong; None if it has
    none, or one that cannot be read."""
    try:
        loaded = load_yaml(path)
        if not isinstance(loaded, dict) or "retrain" not in loaded:
            return None
        return as_retrain(cast(dict[str, Any], loaded)["retrain"], str(path))
    except ParameterError:
        return None


def read_recipe(path: Path) -> Recipe:
    """Read and check one recipe.

    Raises:
        ParameterError: see `read_values` and `read_config`.
    """
    values, options = read_values(path)
    return Recipe(path.stem, path, read_config(values, str(path)), options)


def find_recipes(folder: Path) -> list[Recipe]:
    """The recipes of a folder (not of its subfolders), ordered by name.

    Raises:
        ParameterError: the folder does not exist, or a recipe in it is wrong.
    """
    if not folder.is_dir():
        raise ParameterError(
            "the folder of recipes does not exist",
            where=str(folder.absolute()),
            do="make it, or set DIFFSYNTH_DAGSTER_RECIPES to the folder that holds your recipes",
        )
    return [read_recipe(path) for path in recipe_files(folder)]


def recipe_files(folder: Path) -> list[Path]:
    """The recipe files in a folder, sorted."""
    return sorted(p for p in folder.glob("*") if p.suffix in (".yaml", ".yml") and p.is_file())


def dump_config(config: TrainingConfig) -> str:
    """The whole config as YAML, which `read_values` reads back to the same config."""
    values = config.model_dump(mode="json")
    # A folder without a table: reading the config fills this in again.
    if config.dataset_metadata_path == config.dataset_base_path:
        values["dataset_metadata_path"] = None
    # Without `allow_unicode`: YAML reads some Unicode characters as line breaks.
    return yaml.safe_dump(values, sort_keys=False)
