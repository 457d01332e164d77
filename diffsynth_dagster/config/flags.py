"""The command line of the trainer. Its flags are derived from the parameters."""

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from pydantic.fields import FieldInfo

from diffsynth_dagster.config.override import overridden
from diffsynth_dagster.config.parameters import GROUPS, MARKS, TrainingConfig
from diffsynth_dagster.config.recipe import read_values
from diffsynth_dagster.config.unsupported import refuse_unsupported
from diffsynth_dagster.config.validate import as_flag, read_config, refuse_unknown
from diffsynth_dagster.errors import ParameterError


@dataclass(frozen=True)
class Arguments:
    """The parsed command line.

    Attributes:
        config: the parameters, from the recipe and the flags.
        dry_run: only print what would happen.
        checkpoints_only: export nothing after the training.
        recipe: the recipe file, if one is given.
        no_files: with `dry_run`: do not look at files of models and data.
        num_processes: number of processes according to the recipe, if it says one.
    """

    config: TrainingConfig
    dry_run: bool = False
    checkpoints_only: bool = False
    recipe: Path | None = None
    no_files: bool = False
    num_processes: int | None = None


_SWITCHES = {
    "dry_run": "Check the models and the data, and print as JSON what would happen. Nothing is loaded, "
    "downloaded or made.",
    "no_files": "With --dry_run: say what can be said without the files of the models and the data.",
    "checkpoints_only": "End after the last checkpoint, without files for other tools under exports/.",
}
"""Flags that are not parameters of a training: name → help."""


class _Parser(argparse.ArgumentParser):
    """Raises a `ParameterError` where argparse would print the usage and exit."""

    def error(self, message: str) -> NoReturn:
        raise ParameterError(message, where="the command line", do="see --help")


def _help(name: str, field: FieldInfo) -> str:
    mark = MARKS[name]
    default = field.default
    shown = "" if default in (None, (), False, "", {}) else f" Default: {_text(default)}."
    soon = " (not supported yet)" if mark.planned else ""
    effect = f" [{mark.affects}{', by content' if mark.by_content else ''}]"
    return f"{field.description}{shown}{soon}{effect}".replace("%", "%%")  # argparse formats it


def _text(value: Any) -> str:
    return ",".join(value) if isinstance(value, tuple) else str(value)


def _prompts(text: str) -> tuple[str, ...]:
    """A JSON list of prompts, or one prompt (which may hold commas)."""
    if not text.lstrip().startswith("["):
        return (text,) if text else ()
    try:
        return tuple(json.loads(text))
    except json.JSONDecodeError as error:
        raise argparse.ArgumentTypeError(f"is not a JSON list: {error.msg}") from error


def parser() -> argparse.ArgumentParser:
    """The parser of `python -m diffsynth_dagster.train`."""
    result = _Parser(
        prog="python -m diffsynth_dagster.train",
        description="Train a diffusion model. Start it with `accelerate launch -m "
        "diffsynth_dagster.train`. In brackets: what a parameter affects first.",
        # Flags that are not given must not appear among the values: they would override the recipe.
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    result.add_argument("--recipe", help="YAML file of parameters; flags beside it override it.")
    for name, text in _SWITCHES.items():
        result.add_argument(as_flag(name), action="store_true", help=text)
    for group in GROUPS:
        name = group.__name__.removesuffix("Parameters").lower()
        section = result.add_argument_group(name, (group.__doc__ or "").strip())
        for key, field in group.model_fields.items():
            kind: Any = field.annotation
            # `--name` and `--no-name`, without a value.
            if kind in (bool, bool | None):
                section.add_argument(
                    as_flag(key), action=argparse.BooleanOptionalAction, help=_help(key, field)
                )
            elif key == "sample_prompts":
                section.add_argument(as_flag(key), type=_prompts, help=_help(key, field))
            else:
                # Without `type`: pydantic converts the text, with the same errors as for a recipe.
                section.add_argument(as_flag(key), metavar="X", help=_help(key, field))
    return result


def read_arguments(argv: Sequence[str]) -> Arguments:
    """Parse a command line.

    Raises:
        ParameterError: see `read_config`; an unknown flag is named with the nearest valid one.
    """
    namespace, unknown = parser().parse_known_args(list(argv))
    where = "the command line"
    if unknown:
        # An unsupported model explains its unknown flags, so this error comes before theirs.
        refuse_unsupported(vars(namespace), where)
    for word in unknown:
        if word.startswith("--"):
            name = word[2:].split("=")[0]
            refuse_unknown(
                name, {**TrainingConfig.model_fields, **_SWITCHES, "recipe": None}, where, as_flag
            )
    if unknown:
        is_switch = unknown[0].lower() in ("true", "false")
        raise ParameterError(
            f"'{unknown[0]}' belongs to no flag",
            where=where,
            do="leave it out: flags that switch something on take no value, and --no-… switches off"
            if is_switch
            else "quote values that hold spaces",
        )
    values = vars(namespace)
    named = values.pop("recipe", None)
    recipe = None if named is None else Path(named)
    processes: int | None = None
    switches = {name: values.pop(name) for name in _SWITCHES if name in values}
    if switches.get("no_files") and not switches.get("dry_run"):
        raise ParameterError(
            "--no_files is given but no --dry_run", where=where, do="leave --no_files out"
        )
    if recipe is not None:
        loaded, options = read_values(recipe)
        values = overridden(loaded, values)
        processes = options.num_processes or options.gpus
        where = f"{recipe} and the command line"
    config = read_config(values, where, as_flag)
    return Arguments(config, **switches, recipe=recipe, num_processes=processes)
