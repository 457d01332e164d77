"""The run config of a recipe's job in the Launchpad: flat, with the recipe's values as defaults.

Dagster's own run config is four levels deep and does not show the recipe's values. A
`ConfigMapping` translates: it puts each value that differs from the recipe where Dagster expects
it. So a run with all defaults has no overrides.
"""

from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from functools import cache
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import dagster as dg

from assets.checkpoints import CheckpointsConfig
from assets.common import Kind, asset_key
from assets.prefix import Prefix
from assets.promoted import PromotedConfig
from diffsynth_dagster.config import Recipe, TrainingConfig
from resources import JOB_CONFIG, LAUNCHER, PARAMETERS, Launcher, as_run_config, overridable

(LOGGER,) = JOB_CONFIG["loggers"]
_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")
_EXECUTION = "execution"


@dataclass(frozen=True)
class Option:
    """A choice for one run that is not a parameter of the training.

    Attributes:
        field: its type, default and description.
        path: its keys in Dagster's own run config, outermost first.
    """

    field: dg.Field
    path: tuple[str, ...]


def launch_config(recipe: Recipe, prefix: Prefix = Prefix()) -> dg.ConfigMapping:  # noqa: B008
    """The run config of a recipe's job: its parameters and options, and their translation."""
    values = recipe.config.model_dump(mode="json")
    parameters = {name: _parameter(name, values[name]) for name in overridable()}
    return _mapping(parameters, {**_options_of(recipe, prefix), **_common_options()})


def broken_launch_config() -> dg.ConfigMapping:
    """The run config of a broken recipe's job: it shows no parameters and accepts any.

    A run may have been launched with parameters while the recipe was sound. It must start, so that
    its assets fail with what is wrong in the recipe.
    """
    return _mapping({}, _common_options(), dg.Permissive)


def _mapping(
    parameters: Mapping[str, dg.Field],
    options: Mapping[str, Option],
    shape: Callable[[dict[str, dg.Field]], Any] = dg.Shape,
) -> dg.ConfigMapping:
    """The flat config and its translation into Dagster's.

    Args:
        shape: `dg.Shape` refuses unknown names; `dg.Permissive` accepts them.
    """
    # A config mapping replaces the whole run config, so the executor's must be passed on.
    execution = dg.Field(
        dg.Permissive(), is_required=False, description="Config of the executor, as Dagster has it."
    )
    fields = {
        **parameters,
        **{name: option.field for name, option in options.items()},
        _EXECUTION: execution,
    }

    def nested(flat: Mapping[str, Any]) -> dict[str, Any]:
        config: dict[str, Any] = deepcopy(JOB_CONFIG)
        if _EXECUTION in flat:
            config[_EXECUTION] = flat[_EXECUTION]
        for name, option in options.items():
            if flat[name] != option.field.default_value:
                _put(config, option.path, flat[name])
        # Only what differs from the recipe: every parameter passed on counts as an override.
        changed = {n: flat[n] for n, field in parameters.items() if flat[n] != field.default_value}
        if changed:
            _put(config, ("resources", PARAMETERS, "config"), as_run_config(changed))
        return config

    return dg.ConfigMapping(nested, shape(fields))


def _put(config: dict[str, Any], path: tuple[str, ...], value: Any) -> None:
    """Set a value in nested dictionaries, creating those that are missing."""
    for key in path[:-1]:
        config = config.setdefault(key, {})
    config[path[-1]] = value


def _options_of(recipe: Recipe, prefix: Prefix) -> dict[str, Option]:
    """Options that depend on the recipe. The launcher's have the recipe's values as defaults."""
    of_recipe = recipe.options.model_dump()
    options: dict[str, Option] = {}
    for name in ("num_processes", "accelerate_config", "grace_seconds"):
        field = Launcher.model_fields[name]
        kind, default = _config_type(name, field.annotation), field.default
        if of_recipe.get(name) is not None:
            # No None here: to the launcher it means the recipe's value, so it would change nothing.
            kind, default = _config_type(name, field.annotation, optional=False), of_recipe[name]
        path = ("resources", LAUNCHER, "config", name)
        options[name] = Option(_field(kind, default, field.description), path)
    of_steps: tuple[tuple[Kind, type[dg.Config]], ...] = (
        ("checkpoints", CheckpointsConfig),
        ("promoted", PromotedConfig),
    )
    for kind, config in of_steps if not recipe.config.encodes_only else ():
        step = prefix.step(asset_key(recipe.name, kind))
        for name, field in config.model_fields.items():
            kind_of_field = _config_type(name, field.annotation)
            choice = _field(kind_of_field, field.default, field.description)
            options[name] = Option(choice, ("ops", step, "config", name))
    return options


@cache
def _common_options() -> Mapping[str, Option]:
    level = _field(
        _choice("log_level", _LEVELS), "INFO", "The least level of log lines that a run prints."
    )
    return {"log_level": Option(level, ("loggers", LOGGER, "config", "log_level"))}


def _parameter(name: str, value: Any) -> dg.Field:
    """The config field of a parameter, with the recipe's value as its default."""
    # Most parameters of a recipe have their usual value. All recipes share the fields of these.
    usual = _usual_parameter(name)
    if value == usual.default_value:
        return usual
    return _field(usual.config_type, value, usual.description)


@cache
def _usual_parameter(name: str) -> dg.Field:
    field = TrainingConfig.model_fields[name]
    default = _usual_values()[name]
    return _field(_config_type(name, field.annotation), default, field.description)


@cache
def _usual_values() -> Mapping[str, Any]:
    return TrainingConfig.model_construct().model_dump(mode="json")


def _field(kind: Any, default: Any, description: str | None) -> dg.Field:
    return dg.Field(kind, default_value=default, is_required=False, description=description)


def _config_type(name: str, annotation: Any, optional: bool = True) -> Any:
    """Dagster's config type for a parameter, so that a wrong choice or type is refused before the
    launch. (Dagster has no ranges. They are checked when the run starts.)

    Args:
        annotation: the parameter's Python type.
        optional: whether to accept None if the annotation does.
    """
    if annotation in (bool, int, float, str):
        return annotation
    origin, inner = get_origin(annotation), [a for a in get_args(annotation) if a is not NoneType]
    if origin in (Union, UnionType):
        return _union(name, inner, optional and NoneType in get_args(annotation))
    # Functions, since `inner` suits only the one for this type: the others would fail.
    makers: dict[Any, Callable[[], Any]] = {
        Annotated: lambda: _config_type(name, inner[0]),
        Literal: lambda: _choice(name, inner),
        tuple: lambda: dg.Array(_config_type(name, inner[0])),
        list: lambda: dg.Array(_config_type(name, inner[0])),
        dict: lambda: dg.Map(str, _config_type(name, inner[1])),
    }
    return makers[origin]() if origin in makers else dg.Any


def _union(name: str, inner: list[Any], optional: bool) -> Any:
    if len(inner) == 1:
        kind = _config_type(name, inner[0])
        return dg.Noneable(kind) if optional else kind
    if str in inner:  # one text or a list of texts
        (other,) = (a for a in inner if a is not str)
        return dg.ScalarUnion(str, _config_type(name, other))
    # Dagster has no union of two scalars, such as a choice or a number: the run checks the value.
    return dg.Any


def _choice(name: str, values: list[str] | tuple[str, ...]) -> dg.Enum:
    return dg.Enum(name, [dg.EnumValue(value) for value in values])
