"""Overrides: values of flags or of a run that replace those of a recipe."""

from collections.abc import Mapping
from typing import Any

_LENGTHS = ("num_epochs", "max_train_steps")
_DATA = ("dataset_base_path", "dataset_metadata_path")


def overridden(values: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """The values with the overrides applied.

    `num_epochs` and `max_train_steps` both set the length of the training: overriding one removes
    the other. If a folder without a table is replaced by another one, that one has no table either.

    Args:
        values: parameter name → value.
        given: the overrides: parameter name → value.
    """
    kept = dict(values)
    lengths = [name for name in _LENGTHS if given.get(name) is not None]
    if len(lengths) == 1:
        kept = {name: value for name, value in kept.items() if name not in _LENGTHS}
    base, table = _DATA
    # A resolved config names a folder without a table as its own table: that must not stay.
    if base in given and kept.get(table) == kept.get(base):
        kept.pop(table, None)
    return {**kept, **given}
