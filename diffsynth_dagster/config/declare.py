"""How a parameter is declared: its default, its description, its type and its mark.

The mark says what a parameter affects first. From it, `config.affects` derives which results a
change of the parameter makes out of date. The types here parse values that are written as text.
"""

import json
from dataclasses import asdict, dataclass
from typing import Annotated, Any, Literal, TypedDict, TypeVar, Unpack, cast, get_args

from pydantic import AfterValidator, BaseModel, BeforeValidator, Field
from pydantic.fields import FieldInfo

from diffsynth_dagster.errors import nearest

Affects = Literal["weights", "rows", "latents", "training", "exports", "nothing"]
"""The first stage of a training that a parameter affects, in the order of the stages.

weights: which files the models are loaded from. rows: which samples there are, and what is read of
each. latents: what is encoded, and with which models. training: what is trained, and what a
training writes. exports: the files that are made from a checkpoint. nothing: paths, speed, logs.
"""
AFFECTS: tuple[Affects, ...] = get_args(Affects)

T = TypeVar("T")


@dataclass(frozen=True)
class Mark:
    """What is declared about a parameter beside its type, default and description.

    Attributes:
        affects: see `Affects`.
        by_content: whether it counts by the content of the files that it names. Then the same files
            under another path change nothing.
        each_half: whether each half of split training has its own value. The second half takes all
            other values from the first.
        set_by_asset: whether the Dagster assets set it, so that a run's config cannot.
        planned: whether its feature does not exist yet. Then only the default is accepted.
        needs: a parameter without which this one has no effect.
        off_by_default: whether its default does what was done before the parameter existed. Then
            the default is left out of digests, so that older results stay up to date.
        left_out_as: the value that is written for None in digests, because None means the same. It
            is the default from before None was allowed, so that older results stay up to date.
        used_with: this parameter has an effect only if at least one of these is set. If it has a
            `left_out_as` as well, None is written as that only while none of these is set; with one
            of them, None has a meaning of its own.
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
    """The range of values, with the names of pydantic's `Field`."""

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
    """Declare a parameter: a field of a group of parameters. For the keywords see `Mark`."""
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
    # `json_schema_extra` is pydantic's place for further facts about a field.
    # Type checkers must see the type of the default, as with pydantic's own `Field`.
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
    """Parameter name → mark, for all parameters of a class. Raises `TypeError`: see `mark_of`."""
    return {name: mark_of(name, field) for name, field in group.model_fields.items()}


def _split_commas(value: Any) -> Any:
    """`"a, b"` → `("a", "b")`; an empty text → an empty tuple; other types unchanged."""
    if isinstance(value, str):
        return tuple(part.strip() for part in value.split(",") if part.strip())
    return value


def _parse_json(value: Any) -> Any:
    """A JSON text → its value; other types are returned unchanged. Raises `ValueError`."""
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
    """A model list in either form: a JSON list of paths, or entries separated by commas."""
    is_json = isinstance(value, str) and value.lstrip().startswith("[")
    return _parse_json(value) if is_json else _split_commas(value)


def _one_or_more(value: Any) -> Any:
    """One text → a tuple with it; an empty text → an empty tuple; other types unchanged."""
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
"""A colour by a name that Pillow knows, or as `#rrggbb`. The value is always `#rrggbb`."""
Texts = Annotated[tuple[str, ...], BeforeValidator(_one_or_more)]


class _NamesFolder:
    """Marker in the type of a parameter that names a folder of a model outside the model list."""


ModelFolder = Annotated[str, _NamesFolder()]
"""A path or `repository:folder/`, such as that of a tokenizer."""


class _MayBeEmpty:
    """Marker in the type of a text that may be empty."""


Text = Annotated[str, _MayBeEmpty()]
"""A text that may be empty. (An empty text leaves out any other parameter.)"""


def names_model_folder(field: FieldInfo) -> bool:
    """Whether a parameter's type is `ModelFolder`, with or without None."""
    return ModelFolder in (field.annotation, *get_args(field.annotation))


def is_text(field: FieldInfo) -> bool:
    """Whether a parameter takes a text or None, so that an empty text can stand for None."""
    # `Text | None` is another type than `str | None`, so this is False for it.
    return (
        field.annotation == str | None
        or names_model_folder(field)
        or Colour in get_args(field.annotation)
    )
