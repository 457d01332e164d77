"""Combinations of inputs, parameters and models that a family does not train, declared as data.

A family lists `Refusal`s. One holds conditions about a config and its model list, and the message
for the user. `check_refusals` raises the first one that applies.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from diffsynth_dagster.config.entries import model_entries
from diffsynth_dagster.config.parameters import TrainingConfig
from diffsynth_dagster.errors import ParameterError

MODEL_LIST = "model_paths, model_id_with_origin_paths"
"""The parameters that list the model files, for messages."""
Shapes = Mapping[str, tuple[int, ...]]
"""Tensor name of a built module → shape."""


@dataclass(frozen=True)
class Use:
    """A config, and what is known of the models that it lists.

    Attributes:
        given: component → shapes of its tensors; empty shapes where the files are not there yet.
    """

    config: TrainingConfig
    given: Mapping[str, Shapes]

    @property
    def knows_every_model(self) -> bool:
        """Whether the component of every entry of the model list is known."""
        entries = len(self.config.model_paths) + len(self.config.model_id_with_origin_paths)
        return len(self.given) == entries


class Condition(Protocol):
    """Something that is so, or not, in the use of a family."""

    def holds(self, use: Use) -> bool | None:
        """Whether it is so; None where that is not known before the model files are there."""
        ...


@dataclass(frozen=True)
class InputNamed:
    """A parameter that lists columns lists this one."""

    column: str
    parameter: Literal["extra_inputs", "data_file_keys"] = "extra_inputs"

    def holds(self, use: Use) -> bool:
        """Whether the column is listed."""
        return self.column in getattr(use.config, self.parameter)


@dataclass(frozen=True)
class ParameterSet:
    """A parameter is given another value than its default; or a property of the config is true."""

    name: str

    def holds(self, use: Use) -> bool:
        """Whether it is."""
        if self.name in TrainingConfig.model_fields:
            return use.config.sets(self.name)
        return bool(getattr(use.config, self.name))


@dataclass(frozen=True)
class ModelListed:
    """The model list has files of a component."""

    component: str

    def holds(self, use: Use) -> bool | None:
        """Whether it has; None where it may be an entry that is not recognised yet."""
        if self.component in use.given:
            return True
        return False if use.knows_every_model else None


@dataclass(frozen=True)
class EntryNamed:
    """An entry of the model list has this in its text: a regular expression."""

    pattern: str

    def holds(self, use: Use) -> bool:
        """Whether one has."""
        return any(re.search(self.pattern, entry.text) for entry in model_entries(use.config))


@dataclass(frozen=True)
class ModelHas:
    """The tensors of a component are of a certain kind: `test` is given their shapes."""

    component: str
    test: Callable[[Shapes], bool]

    def holds(self, use: Use) -> bool | None:
        """What `test` returns; None where the shapes are not known."""
        shapes = use.given.get(self.component)
        return self.test(shapes) if shapes else None


@dataclass(frozen=True)
class ModelsDiffer:
    """Two components have different numbers for what must be the same in both."""

    one: "_Measure"
    other: "_Measure"

    def holds(self, use: Use) -> bool | None:
        """Whether they have; None where the shapes of one are not known."""
        numbers: list[int] = []
        for component, measure in (self.one, self.other):
            shapes = use.given.get(component)
            if not shapes:
                return None
            numbers.append(measure(shapes))
        return numbers[0] != numbers[1]


_Measure = tuple[str, Callable[[Shapes], int]]
"""A component, and what its number is by its shapes."""


@dataclass(frozen=True)
class Refusal:
    """A combination that is refused: every condition of `when` holds, and none of `unless`.

    A condition that is not known yet counts as neither, so that nothing is refused by mistake.

    Attributes:
        what, do, where: the message; see `UserError`.
    """

    what: str
    do: str
    when: tuple[Condition, ...]
    unless: tuple[Condition, ...] = ()
    where: str = "extra_inputs"

    def applies(self, use: Use) -> bool:
        """Whether the use is refused."""
        return all(c.holds(use) is True for c in self.when) and all(
            c.holds(use) is False for c in self.unless
        )


def refused_model(component: str, test: Callable[[Shapes], bool], what: str, do: str) -> Refusal:
    """Models of a component are refused by the shapes of their tensors."""
    return Refusal(what, do, when=(ModelHas(component, test),), where=MODEL_LIST)


def models_differ(one: _Measure, other: _Measure, shared: str) -> Refusal:
    """Two components that do not fit together.

    Args:
        shared: what both must have, for the message.
    """
    return Refusal(
        f"'{one[0]}' and '{other[0]}' are of different models: both must have {shared}",
        "give files of one model",
        when=(ModelsDiffer(one, other),),
        where=MODEL_LIST,
    )


def column_needs(column: str, other: str) -> Refusal:
    """A column that says something about another one is not named alone."""
    return Refusal(
        f"{column} is given but not {other}",
        f"name {other} as well",
        when=(InputNamed(column),),
        unless=(InputNamed(other),),
    )


def columns_exclude(one: str, other: str) -> Refusal:
    """Two columns are not named together."""
    named = (InputNamed(one), InputNamed(other))
    return Refusal(f"{one} and {other} do not go together", "name one of them", when=named)


def column_and_model(column: str, component: str, called: str) -> tuple[Refusal, Refusal]:
    """A column and the component that reads it are not named without each other.

    Args:
        called: the component in messages.
    """
    named, listed = InputNamed(column), ModelListed(component)
    return (
        Refusal(
            f"{column} is given but no {called}",
            "add its files to the model list",
            when=(named,),
            unless=(listed, ParameterSet("encodes_only")),
        ),
        Refusal(
            f"the model list has a {called}, but {column} is not given",
            f"name {column}",
            when=(listed,),
            unless=(named,),
        ),
    )


def has_start(start: str) -> Callable[[Shapes], bool]:
    """A test for `ModelHas`: whether the name of a tensor starts like this."""
    return lambda shapes: any(name.startswith(start) for name in shapes)


def check_refusals(refusals: Sequence[Refusal], use: Use) -> None:
    """Raise a `ParameterError` for the first refusal that applies."""
    for refusal in refusals:
        if refusal.applies(use):
            raise ParameterError(refusal.what, where=refusal.where, do=refusal.do)
