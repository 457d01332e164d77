"""Kinds of parameters: how a value may be written, and who takes it."""

import json
from typing import Annotated, Any

from pydantic import BeforeValidator, Field


def _split_commas(value: Any) -> Any:
    """`"a, b"` → `("a", "b")`; lists pass; the empty string is the empty tuple."""
    if isinstance(value, str):
        return tuple(part.strip() for part in value.split(",") if part.strip())
    return value


def _parse_json(value: Any) -> Any:
    """A JSON text → what it says; anything that is no text passes."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"is not JSON: {error.msg} at character {error.pos}; it takes a list of paths, "
            'such as ["dit.safetensors", ["vae-1.safetensors", "vae-2.safetensors"]]'
        ) from error


def _json_or_commas(value: Any) -> Any:
    """Either form of a model list: a JSON list of paths, or entries separated by commas."""
    is_json = isinstance(value, str) and value.lstrip().startswith("[")
    return _parse_json(value) if is_json else _split_commas(value)


def _one_or_more(value: Any) -> Any:
    """One text → a tuple of it; the empty text is the empty tuple."""
    if isinstance(value, str):
        return (value,) if value else ()
    return value


CommaList = Annotated[tuple[str, ...], BeforeValidator(_split_commas)]
ModelList = Annotated[tuple[str | tuple[str, ...], ...], BeforeValidator(_json_or_commas)]
PathTree = Annotated[tuple[str | tuple[str, ...], ...], BeforeValidator(_parse_json)]
Texts = Annotated[tuple[str, ...], BeforeValidator(_one_or_more)]


def planned(default: Any, description: str) -> Any:
    """A parameter of the guide whose feature does not exist yet: any other value is refused."""
    return Field(default, description=description, json_schema_extra={"planned": True})


def particular(default: Any, description: str) -> Any:
    """A parameter that only some families take: the others refuse it by name."""
    return Field(default, description=description, json_schema_extra={"particular": True})
