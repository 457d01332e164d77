"""Which parameters a result depends on, derived from their marks (see `config.declare.Mark`)."""

from typing import Any

from diffsynth_dagster.config.declare import AFFECTS, Affects
from diffsynth_dagster.config.parameters import MARKS, TrainingConfig

__all__ = [
    "AFFECTS",
    "Affects",
    "names_that_affect",
    "off_values",
    "settled_by_checking",
    "settled_by_encoding",
    "trained_components",
    "values_that_affect",
]


def values_that_affect(config: TrainingConfig, *kinds: Affects) -> dict[str, Any]:
    """The parameters that first affect one of some stages, and that count by their value.

    Args:
        kinds: the stages: see `Affects`.

    Returns:
        Parameter name → JSON value. Parameters with `off_by_default` that are off are left out.
    """
    return {n: v for n, v in _chosen(config, kinds, by_content=False).items() if not _is_off(n, v)}


def names_that_affect(config: TrainingConfig, *kinds: Affects) -> dict[str, Any]:
    """The same as `values_that_affect`, for the parameters that count by the content of the files
    that they name (`Mark.by_content`).

    It lets one notice that another file is named without reading the files. The same content under
    another name then looks like a change.
    """
    return {n: v for n, v in _chosen(config, kinds, by_content=True).items() if not _is_off(n, v)}


def settled_by_checking(config: TrainingConfig) -> dict[str, Any]:
    """The parameters that are fixed once a table is checked: name → JSON value.

    A config that uses the table may leave them out or repeat them.
    """
    return _settled(config, "rows")


def settled_by_encoding(config: TrainingConfig) -> dict[str, Any]:
    """The parameters that are fixed once a data set is encoded: name → JSON value.

    The second half of split training may leave them out or repeat them. Parameters that name data
    or models are not included: each half has its own.
    """
    return _settled(config, "rows", "latents")


def _settled(config: TrainingConfig, *kinds: Affects) -> dict[str, Any]:
    """The parameters of `kinds` that both halves of split training share: name → JSON value."""
    return {
        name: value
        for name, value in _chosen(config, kinds, by_content=False).items()
        if not MARKS[name].each_half and not MARKS[name].planned
    }


def trained_components(config: TrainingConfig) -> frozenset[str]:
    """Names of the components that are trained, in full or through a LoRA."""
    return frozenset({*config.trainable_models, *config.lora_base_model})


def off_values(*kinds: Affects) -> dict[str, Any]:
    """The defaults of parameters with `off_by_default`: name → JSON value.

    An older result, in which such a parameter is missing, was made with this value. Parameters of
    which each half of split training has its own are not included.

    Args:
        kinds: the stages that the parameters affect first.
    """
    off = _chosen(TrainingConfig.model_validate({}), kinds, by_content=False)
    settled = [n for n, mark in MARKS.items() if mark.off_by_default and not mark.each_half]
    return {name: value for name, value in off.items() if name in settled}


def _is_off(name: str, value: Any) -> bool:
    """Whether a parameter with `off_by_default` has its default, given its JSON value."""
    default = TrainingConfig.model_fields[name].default
    as_json = list(default) if isinstance(default, tuple) else default  # JSON has no tuples
    return MARKS[name].off_by_default and value == as_json


def _chosen(config: TrainingConfig, kinds: tuple[Affects, ...], by_content: bool) -> dict[str, Any]:
    """The parameters that first affect one of `kinds`: name → JSON value."""
    # The task without `:data_process` or `:train`: training in two halves has the same result.
    values = config.model_dump(mode="json") | {"task": config.task.split(":")[0]}
    return {
        name: _left_out(config, name) if value is None else value
        for name, value in values.items()
        if MARKS[name].affects in kinds and MARKS[name].by_content == by_content
    }


def _left_out(config: TrainingConfig, name: str) -> bool | float | None:
    """The JSON value for a parameter that is None: see `Mark.left_out_as` and `Mark.used_with`."""
    mark = MARKS[name]
    # With one of `used_with`, None has a meaning of its own and must be told from `left_out_as`.
    return None if any(getattr(config, other) for other in mark.used_with) else mark.left_out_as
