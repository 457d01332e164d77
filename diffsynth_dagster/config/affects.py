"""What depends on which parameters, derived from their marks (see `config.declare.Mark`)."""

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
    """Parameter name → JSON value, of those that affect one of the kinds first and count by value.

    The task is without its half, which has no effect. What is off by default is left out where it
    is off: see `Mark`.
    """
    return {n: v for n, v in _chosen(config, kinds, by_content=False).items() if not _is_off(n, v)}


def names_that_affect(config: TrainingConfig, *kinds: Affects) -> dict[str, Any]:
    """Parameter name → JSON value, of those that count by the content that the value names.

    For what must notice that another file is named before the file is read; the same content
    under another name then looks like a change.
    """
    return {n: v for n, v in _chosen(config, kinds, by_content=True).items() if not _is_off(n, v)}


def settled_by_checking(config: TrainingConfig) -> dict[str, Any]:
    """Parameter name → JSON value, of those that say what the rows of a checked table are.

    Whoever goes on with the table may leave them out or give the same.
    """
    return _settled(config, "rows")


def settled_by_encoding(config: TrainingConfig) -> dict[str, Any]:
    """Parameter name → JSON value, of those that the first half of split training settles.

    They say what is encoded of a sample. The second half takes them over: it may leave them out or
    give the same. What names data or models is not among them; each half has its own.
    """
    return _settled(config, "rows", "latents")


def _settled(config: TrainingConfig, *kinds: Affects) -> dict[str, Any]:
    return {
        name: value
        for name, value in _chosen(config, kinds, by_content=False).items()
        if not MARKS[name].each_half and not MARKS[name].planned
    }


def trained_components(config: TrainingConfig) -> frozenset[str]:
    """The components whose weights change: in full, or through a LoRA."""
    return frozenset({*config.trainable_models, *config.lora_base_model})


def off_values(*kinds: Affects) -> dict[str, Any]:
    """Parameter name → its default as a JSON value, of those that are off by default and settled
    once: what a result that does not know the parameter was made with."""
    off = _chosen(TrainingConfig.model_validate({}), kinds, by_content=False)
    settled = [n for n, mark in MARKS.items() if mark.off_by_default and not mark.each_half]
    return {name: value for name, value in off.items() if name in settled}


def _is_off(name: str, value: Any) -> bool:
    default = TrainingConfig.model_fields[name].default
    as_json = list(default) if isinstance(default, tuple) else default
    return MARKS[name].off_by_default and value == as_json


def _chosen(config: TrainingConfig, kinds: tuple[Affects, ...], by_content: bool) -> dict[str, Any]:
    values = config.model_dump(mode="json") | {"task": config.task.split(":")[0]}
    return {
        name: _left_out(config, name) if value is None else value
        for name, value in values.items()
        if MARKS[name].affects in kinds and MARKS[name].by_content == by_content
    }


def _left_out(config: TrainingConfig, name: str) -> bool | float | None:
    """What a parameter that is left out is written as: see `Mark`."""
    mark = MARKS[name]
    return None if any(getattr(config, other) for other in mark.used_with) else mark.left_out_as
