"""What a job's Launchpad shows: the recipe's values at the first level, and the choices of one run.

Dagster's own run config lies four levels deep, and does not know the recipe. What is set here otherwise
than the recipe does goes on to where Dagster has it; so a run with the defaults is one without run config.
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
    """A choice of one run beside the parameters.

    Attributes:
        field: its type, its default and its description.
        path: where Dagster has it in its own run config.
    """

    field: dg.Field
    path: tuple[str, ...]


def launch_config(recipe: Recipe, prefix: Prefix = Prefix()) -> dg.ConfigMapping:  # noqa: B008
    """The run config of a recipe's job: parameters and options, and how it goes on as Dagster's."""
    values = recipe.config.model_dump(mode="json")
    parameters = {name: _parameter(name, values[name]) for name in overridable()}
    return _mapping(parameters, {**_options_of(recipe, prefix), **_common_options()})


def broken_launch_config() -> dg.ConfigMapping:
    """The run config of the job of a recipe that cannot be used: it shows no parameters.

    It takes anything: a run that was launched when the recipe was sound must come as far as to say what
    is wrong with it.
    """
    return _mapping({}, _common_options(), dg.Permissive)


def _mapping(
    parameters: Mapping[str, dg.Field],
    options: Mapping[str, Option],
    shape: Callable[[dict[str, dg.Field]], Any] = dg.Shape,
) -> dg.ConfigMapping:
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
        changed = {n: flat[n] for n, field in parameters.items() if flat[n] != field.default_value}
        if changed:
            _put(config, ("resources", PARAMETERS, "config"), as_run_config(changed))
        return config

    return dg.ConfigMapping(nested, shape(fields))


def _put(config: dict[str, Any], path: tuple[str, ...], value: Any) -> None:
    for key in path[:-1]:
        config = config.setdefault(key, {})
    config[path[-1]] = value


def _options_of(recipe: Recipe, prefix: Prefix) -> dict[str, Option]:
    """The options that depend on the recipe; those of the launcher have its values as defaults."""
    own = recipe.options.model_dump()
    options: dict[str, Option] = {}
    for name in ("num_processes", "accelerate_config", "grace_seconds"):
        field = Launcher.model_fields[name]
        kind, default = _config_type(name, field.annotation), field.default
        if own.get(name) is not None:
            # The launcher takes None for the recipe's.
            kind, default = _config_type(name, field.annotation, optional=False), own[name]
        path = ("resources", LAUNCHER, "config", name)
        options[name] = Option(_field(kind, default, field.description), path)
    of_steps: tuple[tuple[Kind, type[dg.Config]], ...] = (
        ("checkpoints", CheckpointsConfig),
        ("promoted", PromotedConfig),
    )
    for kind, config in of_steps if not recipe.config.encodes_only else ():
        step = prefix.step(asset_key(recipe.name, kind))
        for name, field in config.model_fields.items():
            taken = _field(_config_type(name, field.annotation), field.default, field.description)
            options[name] = Option(taken, ("ops", step, "config", name))
    return options


@cache
def _common_options() -> Mapping[str, Option]:
    level = _field(
        _choice("log_level", _LEVELS), "INFO", "The least level of log lines that a run prints."
    )
    return {"log_level": Option(level, ("loggers", LOGGER, "config", "log_level"))}


def _parameter(name: str, value: Any) -> dg.Field:
    """The field of a parameter with a value as its default. Recipes with the same value share it."""
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
    """Dagster's type of a parameter: what is not one of the texts of a choice, or no number, is refused
    before a run is launched. (Dagster has no ranges: those are checked when it starts.)

    Args:
        optional: whether None is taken where the annotation has it.
    """
    if annotation in (bool, int, float, str):
        return annotation
    origin, inner = get_origin(annotation), [a for a in get_args(annotation) if a is not NoneType]
    if origin in (Union, UnionType):
        return _union(name, inner, optional and NoneType in get_args(annotation))
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
    if str in inner:  # a text or a list of texts
        (other,) = (a for a in inner if a is not str)
        return dg.ScalarUnion(str, _config_type(name, other))
    return dg.Any  # Dagster has no union of scalars, such as a choice or a number


def _choice(name: str, values: list[str] | tuple[str, ...]) -> dg.Enum:
    return dg.Enum(name, [dg.EnumValue(value) for value in values])
