"""Find templates of recipes, and change values in their text. Comments and order are kept."""

import re
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from diffsynth_dagster.errors import ParameterError, nearest, printable
from diffsynth_dagster.project import own_files

PLAIN: Mapping[str, str] = {
    "qwen_image": "qwen_image_lora",
    "flux": "flux_dev_lora",
    "wanvideo": "wan21_t2v_1.3b_lora",
    "ltx2": "ltx2_t2v_lora",
    "stable_diffusion": "sd15_lora",
    "stable_diffusion_xl": "sdxl_lora",
}
"""Family → its default template."""
EXAMPLE_DATA = re.compile(r"data/example_(?:image|video)_dataset")
_COPY = re.compile(r" ?Copy this file to recipes/, and set the (?:three )?paths(?: at its top)?\.")
_KEY = re.compile(r"(\w+):")
_WIDTH = 110


@dataclass(frozen=True)
class Change:
    """A new value for a key of a recipe.

    Attributes:
        value: text, number, or a list of texts; None removes the key.
        comment: the comment above the key; None keeps that of the template.
        after: the key after which it is inserted if the template does not have it.
    """

    key: str
    value: Any
    comment: str | None = None
    after: str = ""


@dataclass
class _Block:
    """A key with the comments directly above it, or only comments and blank lines without a key."""

    comments: list[str]
    key: str = ""
    lines: list[str] | None = None


def templates() -> dict[str, Path]:
    """Name of each template → its file, ordered by family and name."""
    files = sorted((own_files() / "recipes" / "examples").glob("*/*.yaml"))
    return {path.stem: path for path in files}


def find_template(name: str) -> Path:
    """The file of a template. Raises `ParameterError`: there is no template with this name."""
    known = templates()
    if name in known:
        return known[name]
    hint = nearest(name, known)
    raise ParameterError(
        f"there is no template '{name}'" + (f"; {hint}" if hint else ""),
        where="--template",
        do="--list shows all",
    )


def plain_template(family: str) -> Path:
    """The file of a family's default template. Raises `ParameterError`: there is no such family."""
    if family in PLAIN:
        return find_template(PLAIN[family])
    hint = nearest(family, PLAIN)
    raise ParameterError(
        f"there is no family '{family}'" + (f"; {hint}" if hint else ""),
        where="--family",
        do=f"one of: {', '.join(PLAIN)}; or name a template: --list shows all",
    )


def edited(text: str, changes: Sequence[Change], made_by: str, data: str) -> str:
    """The text of a template with changed values.

    The text is edited rather than written anew from the values, so that comments stay.

    Args:
        made_by: the first sentence of the new recipe.
        data: path of the data set, which replaces the example data set in comments.
    """
    blocks = _blocks(text)
    for change in changes:
        _apply(blocks, change)
    # The comment at the top says to copy the file, which is done now.
    head = blocks[0].comments
    about = _COPY.sub("", " ".join(line.removeprefix("# ") for line in head))
    head[:] = [*_comment(made_by), *_comment(about.strip())]
    lines: list[str] = []
    for block in blocks:
        lines += [EXAMPLE_DATA.sub(lambda _: printable(data), line) for line in block.comments]
        lines += block.lines or ()
    return "\n".join(lines) + "\n"


def _blocks(text: str) -> list[_Block]:
    """Split the text of a recipe into its keys, each with its comments."""
    blocks: list[_Block] = []
    comments: list[str] = []
    for line in text.splitlines():
        key = _KEY.match(line)
        if key is not None:
            blocks.append(_Block(comments, key[1], [line]))
            comments = []
        elif line.startswith("#"):
            comments.append(line)
        elif not line:
            blocks.append(_Block([*comments, line]))
            comments = []
        else:
            lines = blocks[-1].lines
            # An indented line, such as an item of a list, continues the value of the key above.
            assert lines is not None, "a value stands behind its key"
            lines.append(line)
    return [*blocks, _Block(comments)] if comments else blocks


def _apply(blocks: list[_Block], change: Change) -> None:
    """Change, insert or remove one key."""
    at = next((n for n, block in enumerate(blocks) if block.key == change.key), None)
    if change.value is None:
        if at is not None:
            del blocks[at]
        return
    if at is None:
        at = 1 + next(n for n, block in enumerate(blocks) if block.key == change.after)
        blocks.insert(at, _Block([], change.key))
    blocks[at].lines = _written(change.key, change.value)
    if change.comment is not None:
        blocks[at].comments[:] = _comment(change.comment)


def _written(key: str, value: Any) -> list[str]:
    """A key and its value as lines of YAML."""
    if not isinstance(value, list):
        return [f"{key}: {_yaml(value)}"]
    items: list[Any] = value
    return [f"{key}:", *(f"  - {_yaml(item)}" for item in items)]


def _yaml(value: str | float | list[str]) -> str:
    """A value on one line; a list in brackets."""
    # Unprintable characters, such as Unicode's line breaks, are escaped only in double quotes.
    needs_quotes = isinstance(value, str) and not value.isprintable()
    if isinstance(value, list):
        return f"[{', '.join(map(_yaml, value))}]"
    # Dumped as a list of one: a bare scalar would be followed by the document end mark `...`.
    text: str = yaml.safe_dump(
        [value], width=1_000_000, allow_unicode=True, default_style='"' if needs_quotes else None
    )
    return text.removeprefix("- ").removesuffix("\n")


def _comment(text: str) -> list[str]:
    return [f"# {line}" for line in textwrap.wrap(text, _WIDTH, break_on_hyphens=False)]
