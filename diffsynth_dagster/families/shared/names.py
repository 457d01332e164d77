"""Tables that rename tensors: how names start in one layout → how they start in another.

A `*` stands for a number, which goes over to the `*` in the same place of the new name, if there is
one: `blocks.*.attn.` → `layers.*.attention.`.
"""

import re
from collections.abc import Mapping
from functools import cache

from diffsynth_dagster.families.contract import Tensors


@cache
def _pattern(start: str) -> re.Pattern[str]:
    """What fits the start of a name."""
    return re.compile(re.escape(start).replace(r"\*", r"(\d+)"))


def with_new_start(name: str, starts: Mapping[str, str]) -> str:
    """A name with its start replaced by the first entry that fits; unchanged where none does."""
    for old, new in starts.items():
        match = _pattern(old).match(name)
        if match is not None:
            for number in match.groups():
                new = new.replace("*", number, 1)
            return new + name[match.end() :]
    return name


def with_new_starts(tensors: Tensors, starts: Mapping[str, str]) -> Tensors:
    """Tensors whose names get new starts: see `with_new_start`."""
    return {with_new_start(name, starts): tensor for name, tensor in tensors.items()}
