"""Parses parameters that map names to values: `betas=0.9,0.99 eps=1e-8`, or JSON."""

import json
from typing import Any, cast

_WORDS: dict[str, Any] = {"True": True, "False": False, "None": None}
"""Python's spelling of these values, which JSON does not know."""


def read_pairs(value: Any) -> Any:
    """`'{"a": 1}'` or `"a=1 b=2,3"` → a dictionary; other types are returned unchanged.

    Values that look like numbers become numbers, also in dictionaries: YAML reads 1e-8 as a text.

    Raises:
        ValueError: the text is in neither form.
    """
    if isinstance(value, str):
        value = _parse(value)
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in cast(dict[Any, Any], value).items()}
    return value


def _parse(text: str) -> dict[str, Any]:
    if text.lstrip().startswith("{"):
        try:
            return json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"is not JSON: {error.msg} at character {error.pos}") from error
    pairs: dict[str, Any] = {}
    for word in text.split():
        name, sign, given = word.partition("=")
        if not name or not sign or name in pairs:
            raise ValueError(
                f"'{word}' is no new name=value; it takes JSON such as "
                '{"betas": [0.9, 0.99]}, or betas=0.9,0.99 eps=1e-8'
            )
        # "0.9,0.99" is a list. A value that begins as JSON has its own commas.
        pairs[name] = given.split(",") if "," in given and given[0] not in "[{" else given
    return pairs


def _plain(value: Any) -> Any:
    """A value with texts that are JSON (numbers, true, …) replaced by what they stand for."""
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in cast(list[Any], value)]
    if not isinstance(value, str):
        return value
    try:
        return _WORDS[value] if value in _WORDS else json.loads(value)
    except json.JSONDecodeError:
        return value
