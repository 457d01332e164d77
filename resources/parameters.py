"""The resource whose run config overrides a recipe's parameters for one run. Its fields are derived
from the parameters of `TrainingConfig`."""

import json
from collections.abc import Mapping
from enum import Enum
from types import GenericAlias, NoneType, UnionType
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union, get_args, get_origin

import dagster as dg
from pydantic import Field, create_model
from pydantic.fields import FieldInfo

from diffsynth_dagster.config import TrainingConfig, read_config
from diffsynth_dagster.config.override import overridden
from diffsynth_dagster.config.parameters import MARKS

_SCALARS = (bool, int, float, str)
_LEFT_OUT = "left_out"


def _run_config_type(name: str, annotation: Any) -> Any:
    """The run config type for a parameter's Python type.

    Scalars, choices, and lists of scalars or choices keep their type. Dagster has no type for the
    rest, which becomes text: mappings and nested lists as JSON, and values that are either a choice
    or a number.
    """
    if annotation in _SCALARS:
        return annotation
    origin, inner = get_origin(annotation), [a for a in get_args(annotation) if a is not NoneType]
    if origin is Literal:
        return _choice(name, inner)
    if origin is Annotated or (origin in (Union, UnionType) and len(inner) == 1):
        return _run_config_type(name, inner[0])
    if origin in (tuple, list) and get_origin(inner[0]) not in (Union, UnionType):
        return GenericAlias(list, (_run_config_type(name, inner[0]),))
    return str


def _choice(name: str, values: list[str]) -> Any:
    """An enum of texts. (Dagster does not accept an optional `Literal`.)"""
    return Enum(name, [(value, value) for value in values])


class ParametersBase(dg.ConfigurableResource):
    """Parameters of one run that override the recipe's. Those left out keep the recipe's values.

    They do not affect the weights assets, which are always those of the recipe's model list.
    """

    def apply(self, config: TrainingConfig) -> TrainingConfig:
        """A recipe's parameters with the overrides of the run config applied.

        Raises:
            ParameterError: see `read_config`.
        """
        given = self.given()
        if not given:
            return config
        return read_config(overridden(config.model_dump(), given), where="the run config")

    def given(self) -> dict[str, Any]:
        """Parameter name → value, of those that the run sets; None for those in `left_out`."""
        values = {name: _plain(getattr(self, name)) for name in overridable()}
        given = {name: value for name, value in values.items() if value is not None}
        left_out: list[str] = _plain(getattr(self, _LEFT_OUT)) or []
        return {**given, **dict.fromkeys(left_out)}


def _plain(value: Any) -> Any:
    """A value with enum members replaced by their texts."""
    if isinstance(value, list):
        return [_plain(item) for item in value]  # pyright: ignore[reportUnknownVariableType]
    return value.value if isinstance(value, Enum) else value


def overridable() -> dict[str, FieldInfo]:
    """Parameter name → declaration, for the parameters that a run may override."""
    return {
        name: field
        for name, field in TrainingConfig.model_fields.items()
        if not MARKS[name].set_by_asset and not MARKS[name].planned
    }


def as_run_config(values: Mapping[str, Any]) -> dict[str, Any]:
    """The run config of `Parameters` that sets some parameters.

    Args:
        values: parameter name → JSON value.
    """
    fields = overridable()
    config: dict[str, Any] = {}
    for name, value in values.items():
        # None cannot be given as a value: to `Parameters` it means the recipe's value.
        if value is None:
            config.setdefault(_LEFT_OUT, []).append(name)
        elif _run_config_type(name, fields[name].annotation) is str and not isinstance(value, str):
            config[name] = json.dumps(value)
        else:
            config[name] = value
    return config


def _fields() -> dict[str, Any]:
    fields: dict[str, Any] = {}
    optional = list[str]()
    for name, field in overridable().items():
        # Optional, with None for "the recipe's": a default would override the recipe in every run.
        kind = _run_config_type(name, field.annotation)
        note = " (The recipe's when left out.)"
        fields[name] = (kind | None, Field(None, description=f"{field.description}{note}"))
        if NoneType in get_args(field.annotation):
            optional.append(name)
    names = GenericAlias(list, (_choice(_LEFT_OUT, optional),))
    about = "Parameters that the run leaves out though the recipe sets them."
    return {**fields, _LEFT_OUT: (names | None, Field(None, description=about))}


# For type checkers it is the base class: they cannot see the fields of a class made at run time.
if TYPE_CHECKING:
    Parameters = ParametersBase
else:
    Parameters = create_model(
        "Parameters", __base__=ParametersBase, __doc__=ParametersBase.__doc__, **_fields()
    )
