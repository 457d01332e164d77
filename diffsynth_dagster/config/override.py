"""Values that take the place of others."""

from collections.abc import Mapping
from typing import Any

_LENGTHS = ("num_epochs", "max_train_steps")
_DATA = ("dataset_base_path", "dataset_metadata_path")


def overridden(values: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """The values with those that are given in their place, by parameter name.

    What says how long the training is takes the place of whatever said it before. A folder without a
    table stays one where another folder is given.
    """
    kept = dict(values)
    lengths = [name for name in _LENGTHS if given.get(name) is not None]
    if len(lengths) == 1:
        kept = {name: value for name, value in kept.items() if name not in _LENGTHS}
    base, table = _DATA
    if base in given and kept.get(table) == kept.get(base):
        kept.pop(table, None)
    return {**kept, **given}
