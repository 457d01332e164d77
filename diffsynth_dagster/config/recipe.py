"""Recipes: one flat YAML file for each training."""

import errno
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import yaml
from pydantic import BaseModel, ConfigDict, Field

from diffsynth_dagster.config.checks import as_key, read_config, refuse_unknown, validated
from diffsynth_dagster.config.parameters import TrainingConfig
from diffsynth_dagster.errors import ParameterError, is_text


class RecipeOptions(BaseModel):
    """Keys of a recipe that are about running it, not about what is trained."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    description: str = Field("", description="What the training is for.")
    schedule: str | None = Field(
        None, description="Cron expression; the schedule starts switched off."
    )
    num_processes: int | None = Field(
        None, ge=1, description="Training processes; accelerate's own choice when left out."
    )
    retries: int = Field(
        2,
        ge=0,
        description="How often Dagster starts the processes again after a crash; they go on from the "
        "newest state. A mistake is never tried again.",
    )
    accelerate_config: str | None = Field(
        None, description="Configuration file handed to `accelerate launch --config_file`."
    )


@dataclass(frozen=True)
class Recipe:
    """One training: its name (the file's stem), its parameters, and how it is run."""

    name: str
    path: Path
    config: TrainingConfig
    options: RecipeOptions


_TIMESTAMP = "tag:yaml.org,2002:timestamp"


class _Loader(yaml.SafeLoader):
    """Refuses a key that stands twice, which YAML's own loader lets the later one win, and characters
    that no file can be named with and no database keeps. Reads a date as text: no parameter is one.
    """

    yaml_implicit_resolvers = {  # noqa: RUF012 - as the base class declares it
        first: [(tag, pattern) for tag, pattern in resolvers if tag != _TIMESTAMP]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_scalar(self, node: yaml.ScalarNode | yaml.MappingNode) -> Any:
        text = super().construct_scalar(node)
        if not is_text(str(text)):
            raise yaml.constructor.ConstructorError(
                None, None, "a NUL, or half of a surrogate pair, is no text", node.start_mark
            )
        return text

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key_node, _ in node.value:
            key = str(self.construct_object(key_node, deep=True))
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key '{key}' stands twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep=deep)


def read_values(path: Path) -> tuple[dict[str, Any], RecipeOptions]:
    """The parameters named in a recipe, unchecked but for their names, and its options.

    Raises:
        ParameterError: the file cannot be read, is no flat mapping, or has an unknown key.
    """
    where = str(path)
    try:
        if path.exists() and not path.is_file():  # a pipe may wait for its writer for ever
            raise OSError(errno.EINVAL, "it is not a regular file")
        loaded = yaml.load(path.read_text(encoding="utf-8"), _Loader)  # a SafeLoader
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise ParameterError(
            f"the recipe cannot be read: {reason}",
            where=str(path.absolute()),
            do="name a YAML file",
        ) from error
    # A ValueError: 0x_, or a number of 5,000 digits; an OverflowError: 1:1:1:…:1.0.
    except (yaml.YAMLError, ValueError, OverflowError) as error:
        message = " ".join(str(error).split())
        raise ParameterError(
            f"the recipe is not YAML: {message}", where=where, do="correct that line"
        ) from error
    except RecursionError as error:
        raise ParameterError(
            "the recipe has too many brackets inside each other",
            where=where,
            do="write one `name: value` in each line",
        ) from error
    if not isinstance(loaded, dict):
        raise ParameterError(
            "the recipe is not a mapping of parameters to values",
            where=where,
            do="write one `name: value` in each line",
        )
    values = {str(key): value for key, value in cast(dict[Any, Any], loaded).items()}
    known = {**TrainingConfig.model_fields, **RecipeOptions.model_fields}
    for name in values:
        if name not in known:
            refuse_unknown(name, known, where, as_key)
    raw = {name: values.pop(name) for name in RecipeOptions.model_fields if name in values}
    return values, validated(RecipeOptions, raw, where)


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
    """The files of recipes in a folder, sorted."""
    return sorted(p for p in folder.glob("*") if p.suffix in (".yaml", ".yml") and p.is_file())


def dump_config(config: TrainingConfig) -> str:
    """The config as resolved: YAML that `read_values` reads back to the same config."""
    # Escaped: YAML takes some Unicode characters for line breaks.
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
