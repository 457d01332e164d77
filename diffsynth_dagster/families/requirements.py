"""Combinations of inputs, parameters and models that a family cannot train, declared as data.

A family lists `Refusal`s. Each has conditions on the config and its models, and the message for the
user. `check_refusals` raises the first refusal that applies.
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
"""Tensor name in the built module → shape."""


@dataclass(frozen=True)
class Use:
    """A config, and what is known so far about its models.

    Attributes:
        given: component → shapes of its tensors; empty if its files are not there yet.
    """

    config: TrainingConfig
    given: Mapping[str, Shapes]

    @property
    def knows_every_model(self) -> bool:
        """Whether every entry of the model list was recognised as a component."""
        entries = len(self.config.model_paths) + len(self.config.model_id_with_origin_paths)
        return len(self.given) == entries


class Condition(Protocol):
    """A yes-or-no question about a config and its models."""

    def holds(self, use: Use) -> bool | None:
        """The answer; None if it depends on model files that are not there yet."""
        ...


@dataclass(frozen=True)
class InputNamed:
    """The column is listed in `extra_inputs` or `data_file_keys`."""

    column: str
    parameter: Literal["extra_inputs", "data_file_keys"] = "extra_inputs"

    def holds(self, use: Use) -> bool:
        """Whether the column is listed."""
        return self.column in getattr(use.config, self.parameter)


@dataclass(frozen=True)
class ParameterSet:
    """A parameter has another value than its default, or a property of the config is true."""

    name: str

    def holds(self, use: Use) -> bool:
        """Whether it is set or true."""
        if self.name in TrainingConfig.model_fields:
            return use.config.sets(self.name)
        return bool(getattr(use.config, self.name))


@dataclass(frozen=True)
class ModelListed:
    """The model list contains a component."""

    component: str

    def holds(self, use: Use) -> bool | None:
        """Whether it does; None if an entry that is not recognised yet could be the component."""
        if self.component in use.given:
            return True
        return False if use.knows_every_model else None


@dataclass(frozen=True)
class EntryNamed:
    """The text of an entry of the model list matches a regular expression."""

    pattern: str

    def holds(self, use: Use) -> bool:
        """Whether one matches."""
        return any(re.search(self.pattern, entry.text) for entry in model_entries(use.config))


@dataclass(frozen=True)
class ModelHas:
    """The shapes of a component's tensors pass a test."""

    component: str
    test: Callable[[Shapes], bool]

    def holds(self, use: Use) -> bool | None:
        """The result of `test`; None if the shapes are not known."""
        shapes = use.given.get(self.component)
        return self.test(shapes) if shapes else None


@dataclass(frozen=True)
class ModelsDiffer:
    """Two components disagree about a size that must be the same in both."""

    one: "_Measure"
    other: "_Measure"

    def holds(self, use: Use) -> bool | None:
        """Whether they do; None if the shapes of either are not known."""
        sizes: list[int] = []
        for component, measure in (self.one, self.other):
            shapes = use.given.get(component)
            if not shapes:
                return None
            sizes.append(measure(shapes))
        return sizes[0] != sizes[1]


_Measure = tuple[str, Callable[[Shapes], int]]
"""A component, and a function that reads the size from its shapes."""


@dataclass(frozen=True)
class Refusal:
    """A combination that is refused if every condition in `when` holds and none in `unless`.

    An unknown condition (None) prevents the refusal, in `when` and in `unless`. So nothing is
    refused before the facts are known.

    Attributes:
        what, do, where: the message; see `UserError`.
    """

    what: str
    do: str
    when: tuple[Condition, ...]
    unless: tuple[Condition, ...] = ()
    where: str = "extra_inputs"

    def applies(self, use: Use) -> bool:
        """Whether this combination is refused."""
        # `is`, because None (unknown) is neither True nor False.
        return all(c.holds(use) is True for c in self.when) and all(
            c.holds(use) is False for c in self.unless
        )


def refused_model(component: str, test: Callable[[Shapes], bool], what: str, do: str) -> Refusal:
    """Refuse the models of a component whose shapes pass `test`."""
    return Refusal(what, do, when=(ModelHas(component, test),), where=MODEL_LIST)


def models_differ(one: _Measure, other: _Measure, shared: str) -> Refusal:
    """Refuse two components that do not fit together.

    Args:
        shared: what both must have in common, for the message.
    """
    return Refusal(
        f"'{one[0]}' and '{other[0]}' are of different models: both must have {shared}",
        "give files of one model",
        when=(ModelsDiffer(one, other),),
        where=MODEL_LIST,
    )


def column_needs(column: str, other: str) -> Refusal:
    """Refuse a column that makes no sense without the other one."""
    return Refusal(
        f"{column} is given but not {other}",
        f"name {other} as well",
        when=(InputNamed(column),),
        unless=(InputNamed(other),),
    )


def columns_exclude(one: str, other: str) -> Refusal:
    """Refuse two columns in one config."""
    named = (InputNamed(one), InputNamed(other))
    return Refusal(f"{one} and {other} do not go together", "name one of them", when=named)


def column_and_model(column: str, component: str, called: str) -> tuple[Refusal, Refusal]:
    """Refuse a column without the component that reads it, and the component without the column.

    Args:
        called: the component's name in messages.
    """
    named, listed = InputNamed(column), ModelListed(component)
    return (
        Refusal(
            f"{column} is given but no {called}",
            "add its files to the model list",
            when=(named,),
            # The first half of a split training encodes the column without the component.
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
    """A test for `ModelHas`: whether any tensor name has this prefix."""
    return lambda shapes: any(name.startswith(start) for name in shapes)


def check_refusals(refusals: Sequence[Refusal], use: Use) -> None:
    """Raise a `ParameterError` for the first refusal that applies."""
    for refusal in refusals:
        if refusal.applies(use):
            raise ParameterError(refusal.what, where=refusal.where, do=refusal.do)
