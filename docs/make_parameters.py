"""Write `parameters.md` from the declarations of the parameters.

python docs/make_parameters.py
"""

import re
from collections.abc import Iterator
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from make_families import code, table
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from diffsynth_dagster.config import GROUPS, TrainingConfig
from diffsynth_dagster.config.declare import Mark, is_text, mark_of
from diffsynth_dagster.config.recipe import RecipeOptions
from diffsynth_dagster.config.retrain import Retrain
from diffsynth_dagster.families import each_family

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "parameters.md"
HEAD = """# Parameters

Every parameter of a training. This page is made by `docs/make_parameters.py` from the declarations in
`diffsynth_dagster/config/`: change those, not this page. [usage.md](usage.md) and [choosing.md](choosing.md) say how
they are used.

Each is a key of a recipe (`lora_rank: 16`), a flag of the command line (`--lora_rank 16`) and a field of the run config in
Dagster, by the same name. A list is written with commas (`to_q,to_k`), or in a recipe as a list too. A switch is `true` or
`false` in a recipe; as a flag, `--keep_best` switches on and `--no-keep_best` off.

**Affects** says what a parameter has an effect on first, in the order in which a training goes through it. What comes
later is made anew too when it changes, up to what is trained; `exports` and `nothing` never make a training run again.

| affects | meaning |
|---|---|
| `weights` | which files the models are |
| `rows` | which samples there are, and what is read of each |
| `latents` | what is encoded, and with which models |
| `training` | what is trained, and what a training writes |
| `exports` | the files that are made of a checkpoint |
| `nothing` | where things lie, how fast it goes, and how it is watched |

"By content" means that the content of the file counts, and not its name. "Not there yet" means that only the default is
accepted.
"""
TITLES = {
    "Dataset": "Data set",
    "Model": "Models",
    "FamilySpecific": "Of some families",
    "Training": "Training",
    "Objective": "What a step is drawn from",
    "Learning": "How weights are changed",
    "Lora": "LoRA and other methods",
    "Gradient": "Memory against time",
    "Size": "Size of the samples",
    "Output": "What is written",
    "Sampling": "Samples",
    "Validation": "Held-out samples",
}
"""Name of a group, without its end → heading."""
OPTIONS = (
    "How Dagster runs it: [usage.md](usage.md#in-dagster). The command line does not heed these."
)
RETRAIN = "When it is trained again by itself: [retraining.md](retraining.md)."
KINDS = {str: "text", int: "whole number", float: "number", bool: "switch"}
LIMITS = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}


def parts(annotation: Any) -> Iterator[Any]:
    """The types that a type may be, without None."""
    if get_origin(annotation) in (Union, UnionType):
        for part in get_args(annotation):
            yield from parts(part)
    elif get_origin(annotation) is Annotated:
        yield from parts(get_args(annotation)[0])
    elif annotation is not NoneType:
        yield annotation


def kind(annotation: Any) -> str:
    """What values a type takes, in words."""
    if get_origin(annotation) is Literal:
        return code(str(value) for value in get_args(annotation))
    if get_origin(annotation) is list:
        return f"list of {kind(get_args(annotation)[0])}"
    if get_origin(annotation) is tuple:
        return "list"
    if get_origin(annotation) is dict:
        return "`name=value`, or JSON"
    return KINDS.get(annotation, "mapping")


def values(field: FieldInfo) -> str:
    """What values a parameter takes, with its range."""
    said = " or ".join(dict.fromkeys(kind(part) for part in parts(field.annotation)))
    bounds = [
        f"{sign}&nbsp;{getattr(each, name):g}"
        for each in field.metadata
        for name, sign in LIMITS.items()
        if isinstance(getattr(each, name, None), int | float) and abs(getattr(each, name)) < 2**31
    ]
    return ", ".join([said, *bounds])


def default(field: FieldInfo) -> str:
    """The default of a parameter; a dash for what is left out."""
    value = field.default
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if value is None or value in ((), {}, "") or (is_text(field) and not value):
        return "–"
    return f"`{','.join(value) if isinstance(value, tuple) else value}`"


def taken_by(name: str) -> str:
    """Which families take a parameter that not all of them take."""
    families = [family.name for family in each_family() if name in family.parameters]
    return f" Only for {code(families)}." if families else ""


def in_code(text: str) -> str:
    """A description in which names of parameters are in code style, and nothing else is Markdown."""
    text = text.replace("|", "&#124;").replace("*", "&#42;")
    names = "|".join(name for name in TrainingConfig.model_fields if "_" in name)
    return re.sub(rf"(?<![`\w])({names})(?![`\w])", r"`\1`", text)


def description(name: str, field: FieldInfo, mark: Mark) -> str:
    """What a parameter is, and what it needs."""
    said = in_code(field.description or "") + taken_by(name)
    if mark.needs is not None:
        said += f" Needs `{mark.needs}`."
    if mark.planned:
        said += " Not there yet."
    return said


def row(name: str, field: FieldInfo) -> list[str]:
    """The row of a parameter."""
    mark = mark_of(name, field)
    affects = f"`{mark.affects}`{', by content' if mark.by_content else ''}"
    return [f"`{name}`", values(field), default(field), description(name, field, mark), affects]


def section(group: type[BaseModel]) -> list[str]:
    """The section of a group."""
    title = TITLES[group.__name__.removesuffix("Parameters")]
    rows = [row(name, field) for name, field in group.model_fields.items()]
    said = (group.__doc__ or "").strip()
    head = ("parameter", "values", "default", "what it is", "affects")
    return [f"\n## {title}\n", f"{said}\n", *table(head, rows)]


def keys(title: str, said: str, group: type[BaseModel]) -> list[str]:
    """The section of keys of a recipe that are no parameters."""
    rows = [
        [f"`{name}`", values(field), default(field), in_code(field.description or "")]
        for name, field in group.model_fields.items()
    ]
    return [
        f"\n## {title}\n",
        f"{said}\n",
        *table(("key", "values", "default", "what it is"), rows),
    ]


def page() -> str:
    """The whole page."""
    lines = [line for group in GROUPS for line in section(group)]
    lines += keys("Keys of a recipe that are no parameters", OPTIONS, RecipeOptions)
    lines += keys("Keys of `retrain`", RETRAIN, Retrain)
    return HEAD + "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
