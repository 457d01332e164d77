"""How a parameter is declared: its default, its description, and its mark.

The mark says what a parameter affects first; `config.effect` derives from it what makes a result
out of date. The types say how a value may be written.
"""

import json
from dataclasses import asdict, dataclass
from typing import Annotated, Any, Literal, TypedDict, TypeVar, Unpack, cast, get_args

from pydantic import AfterValidator, BaseModel, BeforeValidator, Field
from pydantic.fields import FieldInfo

from diffsynth_dagster.errors import nearest

Affects = Literal["weights", "rows", "latents", "training", "exports", "nothing"]
"""What a parameter affects first, in the order in which a training goes through it.

weights: which files the models are. rows: which samples there are, and what is read of each.
latents: what is encoded, and with which models. training: what is trained, and what a training
writes. exports: the files that are made of a checkpoint. nothing: where things lie, how fast it
goes, and how it is watched.
"""
AFFECTS: tuple[Affects, ...] = get_args(Affects)

T = TypeVar("T")


@dataclass(frozen=True)
class Mark:
    """What is known about a parameter beside its type, default and description.

    Attributes:
        affects: see `Affects`.
        by_content: whether it counts by the content of the files that it names: another name of
            the same content changes nothing.
        each_half: whether each half of split training has a value of its own; the second takes over
            the others from the first.
        set_by_asset: whether each Dagster asset sets it, so that a run cannot.
        planned: whether its feature does not exist yet: only the default is accepted.
        needs: a parameter without which this one means nothing.
        off_by_default: whether its default leaves everything as it was before there was this
            parameter: it then counts only with another value, so that older results stay up to date.
        left_out_as: what None is written as where a value counts, and means the same as: that of a
            parameter of before, so that older results stay up to date.
        used_with: parameters without any of which this one changes nothing. Only then None is written
            as `left_out_as`, if it has both: with one of them it means something of its own.
    """

    affects: Affects
    by_content: bool = False
    each_half: bool = False
    set_by_asset: bool = False
    planned: bool = False
    needs: str | None = None
    off_by_default: bool = False
    left_out_as: bool | float | None = None
    used_with: tuple[str, ...] = ()


class Limits(TypedDict, total=False):
    """What values are taken, as pydantic's `Field` has it."""

    ge: float
    gt: float
    le: float
    lt: float
    min_length: int
    pattern: str


def parameter(
    default: T,
    description: str,
    *,
    affects: Affects,
    by_content: bool = False,
    each_half: bool = False,
    set_by_asset: bool = False,
    planned: bool = False,
    needs: str | None = None,
    off_by_default: bool = False,
    left_out_as: bool | float | None = None,
    used_with: tuple[str, ...] = (),
    **limits: Unpack[Limits],
) -> T:
    """A field of a group of parameters. For the marks see `Mark`."""
    mark = Mark(
        affects,
        by_content,
        each_half,
        set_by_asset,
        planned,
        needs,
        off_by_default,
        left_out_as,
        used_with,
    )
    # What type checkers see is the default, as with pydantic's own `Field`.
    field: Any = Field(default, description=description, json_schema_extra=asdict(mark), **limits)
    return cast(T, field)


def mark_of(name: str, field: FieldInfo) -> Mark:
    """The mark of a declared parameter.

    Raises:
        TypeError: it was not declared with `parameter`.
    """
    extra = field.json_schema_extra
    if not isinstance(extra, dict) or extra.get("affects") not in AFFECTS:
        raise TypeError(f"the parameter '{name}' does not say what it affects: use `parameter`")
    return Mark(**cast(dict[str, Any], extra))


def marks_of(group: type[BaseModel]) -> dict[str, Mark]:
    """Parameter name → mark, for all parameters of a class. Raises as `mark_of` does."""
    return {name: mark_of(name, field) for name, field in group.model_fields.items()}


def _split_commas(value: Any) -> Any:
    """`"a, b"` → `("a", "b")`; lists pass; the empty string is the empty tuple."""
    if isinstance(value, str):
        return tuple(part.strip() for part in value.split(",") if part.strip())
    return value


def _parse_json(value: Any) -> Any:
    """A JSON text → its value; anything that is no text passes."""
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


def _as_hex(value: str) -> str:
    """A colour as `#rrggbb`. Raises ValueError."""
    from PIL import ImageColor

    try:
        red, green, blue, *alpha = ImageColor.getrgb(value)
    except ValueError:
        hint = nearest(value.lower(), ImageColor.colormap)
        raise ValueError(
            "is no colour: it takes a name, such as white, or #rrggbb, in quotes in a recipe"
            + (f"; {hint}" if hint else "")
        ) from None
    if alpha:
        raise ValueError("has an alpha: it takes a colour that covers, such as white or #rrggbb")
    return f"#{red:02x}{green:02x}{blue:02x}"


CommaList = Annotated[tuple[str, ...], BeforeValidator(_split_commas)]
ModelList = Annotated[tuple[str | tuple[str, ...], ...], BeforeValidator(_json_or_commas)]
PathTree = Annotated[tuple[str | tuple[str, ...], ...], BeforeValidator(_parse_json)]
Colour = Annotated[str, AfterValidator(_as_hex)]
"""A name that Pillow knows, or `#rrggbb`, which it becomes."""
Texts = Annotated[tuple[str, ...], BeforeValidator(_one_or_more)]


class _NamesFolder:
    """Marks the type of a parameter that names a folder of a model beside the model list."""


ModelFolder = Annotated[str, _NamesFolder()]
"""A path or `repository:folder/`, such as that of a tokenizer."""


class _MayBeEmpty:
    """Marks the type of a text that may be given as the empty one."""


Text = Annotated[str, _MayBeEmpty()]
"""A text whose empty value is a value, and does not leave the parameter out."""


def names_model_folder(field: FieldInfo) -> bool:
    """Whether a parameter's type is `ModelFolder`, or that or None."""
    return ModelFolder in (field.annotation, *get_args(field.annotation))


def is_text(field: FieldInfo) -> bool:
    """Whether a parameter takes a text that may be left out."""
    return (
        field.annotation == str | None
        or names_model_folder(field)
        or Colour in get_args(field.annotation)
    )
