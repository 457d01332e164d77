"""Renaming of tensors by prefix, from one layout to another.

A `*` in the old prefix matches a number. The number replaces the corresponding `*` in the new
prefix, if there is one: `blocks.*.attn.` → `layers.*.attention.`.
"""

import re
from collections.abc import Mapping
from functools import cache

from diffsynth_dagster.families.contract import Tensors


@cache
def _pattern(start: str) -> re.Pattern[str]:
    """A regular expression for a prefix with `*`."""
    return re.compile(re.escape(start).replace(r"\*", r"(\d+)"))


def with_new_start(name: str, starts: Mapping[str, str]) -> str:
    """Replace the prefix of a name by the first entry that matches. Other names stay."""
    for old, new in starts.items():
        match = _pattern(old).match(name)
        if match is not None:
            for number in match.groups():
                new = new.replace("*", number, 1)
            return new + name[match.end() :]
    return name


def with_new_starts(tensors: Tensors, starts: Mapping[str, str]) -> Tensors:
    """Rename tensors by prefix: see `with_new_start`."""
    return {with_new_start(name, starts): tensor for name, tensor in tensors.items()}
