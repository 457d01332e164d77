"""Run config that overrides a recipe's parameters for one run, derived from the parameters."""

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
    """The type that this run config has for a parameter's: scalars, choices, and lists of texts or
    choices.

    The others are a text: mappings and lists that may hold lists, as JSON, and what is either a choice
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
    """An enum of texts. (Dagster takes a `Literal` only where it cannot be left out.)"""
    return Enum(name, [(value, value) for value in values])


class ParametersBase(dg.ConfigurableResource):
    """Parameters that a run sets otherwise than the recipe does. Those left out keep the recipe's.

    Weights assets stay those of the recipe's model list, whatever a run trains with.
    """

    def apply(self, config: TrainingConfig) -> TrainingConfig:
        """A recipe's parameters with those that the run config sets in their place.

        Raises:
            ParameterError: see `read_config`.
        """
        given = self.given()
        if not given:
            return config
        return read_config(overridden(config.model_dump(), given), where="the run config")

    def given(self) -> dict[str, Any]:
        """Parameter name → value, of those that the run sets; None of those that it leaves out."""
        values = {name: _plain(getattr(self, name)) for name in overridable()}
        given = {name: value for name, value in values.items() if value is not None}
        left_out: list[str] = _plain(getattr(self, _LEFT_OUT)) or []
        return {**given, **dict.fromkeys(left_out)}


def _plain(value: Any) -> Any:
    if isinstance(value, list):
        return [_plain(item) for item in value]  # pyright: ignore[reportUnknownVariableType]
    return value.value if isinstance(value, Enum) else value


def overridable() -> dict[str, FieldInfo]:
    """Parameter name → declaration, of those that a run may set."""
    return {
        name: field
        for name, field in TrainingConfig.model_fields.items()
        if not MARKS[name].set_by_asset and not MARKS[name].planned
    }


def as_run_config(values: Mapping[str, Any]) -> dict[str, Any]:
    """Parameter values as JSON has them → the run config of `Parameters` that sets them."""
    fields = overridable()
    config: dict[str, Any] = {}
    for name, value in values.items():
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
        kind = _run_config_type(name, field.annotation)
        note = " (The recipe's when left out.)"
        fields[name] = (kind | None, Field(None, description=f"{field.description}{note}"))
        if NoneType in get_args(field.annotation):
            optional.append(name)
    names = GenericAlias(list, (_choice(_LEFT_OUT, optional),))
    about = "Parameters that the run leaves out though the recipe sets them."
    return {**fields, _LEFT_OUT: (names | None, Field(None, description=about))}


if TYPE_CHECKING:
    Parameters = ParametersBase
else:
    Parameters = create_model(
        "Parameters", __base__=ParametersBase, __doc__=ParametersBase.__doc__, **_fields()
    )
