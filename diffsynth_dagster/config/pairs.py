"""Values by name, written as text."""

import json
from typing import Any, cast

_WORDS: dict[str, Any] = {"True": True, "False": False, "None": None}


def read_pairs(value: Any) -> Any:
    """`'{"a": 1}'` or `"a=1 b=2,3"` → a dictionary; anything that is no text passes.

    Texts that look like numbers become numbers: YAML reads 1e-8 as a text.
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
        pairs[name] = given.split(",") if "," in given and given[0] not in "[{" else given
    return pairs


def _plain(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in cast(list[Any], value)]
    if not isinstance(value, str):
        return value
    try:
        return _WORDS[value] if value in _WORDS else json.loads(value)
    except json.JSONDecodeError:
        return value
