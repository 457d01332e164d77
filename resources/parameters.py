"""Run config that overrides a recipe's parameters for one run, derived from the parameters."""

from typing import TYPE_CHECKING, Annotated, Any, get_args, get_origin

import dagster as dg
from pydantic import Field, create_model
from pydantic.fields import FieldInfo

from diffsynth_dagster.config import TrainingConfig, read_config
from diffsynth_dagster.config.parameters import MARKS

_SCALARS = (bool, int, float, str)


def _run_config_type(annotation: Any) -> Any:
    """The type that Dagster has for a parameter's: scalars, and lists of text for tuples.

    A tuple that may hold tuples is a text with JSON, since run config has no such type.
    """
    if annotation in _SCALARS:
        return annotation
    if get_origin(annotation) is Annotated:
        return _run_config_type(get_args(annotation)[0])
    if get_origin(annotation) is tuple:
        return list[str] if get_args(annotation)[0] is str else str
    inner = [a for a in get_args(annotation) if a is not type(None)]
    # A choice of texts (Literal) has values where others have types.
    return str if isinstance(inner[0], str) else _run_config_type(inner[0])


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
        return read_config({**config.model_dump(), **given}, where="the run config")

    def given(self) -> dict[str, Any]:
        """Parameter name → value, of those that the run sets."""
        values = {name: getattr(self, name) for name in _overridable()}
        return {name: value for name, value in values.items() if value is not None}


def _overridable() -> dict[str, FieldInfo]:
    return {
        name: field
        for name, field in TrainingConfig.model_fields.items()
        if not MARKS[name].set_by_asset and not MARKS[name].planned
    }


def _fields() -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for name, field in _overridable().items():
        kind = _run_config_type(field.annotation)
        note = " (The recipe's when left out.)"
        fields[name] = (kind | None, Field(None, description=f"{field.description}{note}"))
    return fields


if TYPE_CHECKING:
    Parameters = ParametersBase
else:
    Parameters = create_model(
        "Parameters", __base__=ParametersBase, __doc__=ParametersBase.__doc__, **_fields()
    )
