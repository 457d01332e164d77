"""What families refuse, as data: conditions that hold, do not hold, or are not known yet."""

import re
from typing import Any

import pytest
from conftest import make_config

from diffsynth_dagster.errors import ParameterError
from diffsynth_dagster.families import each_family
from diffsynth_dagster.families.contract import Family
from diffsynth_dagster.families.requirements import (
    Condition,
    EntryNamed,
    InputNamed,
    ModelHas,
    ModelListed,
    ModelsDiffer,
    ParameterSet,
    Refusal,
    Shapes,
    Use,
    check_refusals,
    column_and_model,
    column_needs,
    columns_exclude,
)

SMALL: Shapes = {"a.weight": (2, 3)}
ENCODES = {"task": "sft:data_process"}


def use(given: dict[str, Shapes] | None = None, **values: Any) -> Use:
    """A use of a family by a recipe with two models, of which `given` are known."""
    base = {
        "dataset_base_path": "data",
        "dataset_metadata_path": "data/metadata.csv",
        "model_paths": ["one.safetensors", "two.safetensors"],
        "trainable_models": "dit",
    }
    return Use(make_config({**base, **values}), given or {})


def rows(shapes: Shapes) -> int:
    return shapes["a.weight"][0]


def columns(shapes: Shapes) -> int:
    return shapes["a.weight"][1]


@pytest.mark.parametrize(
    ("condition", "situation", "holds"),
    [
        (InputNamed("a"), use(extra_inputs="a,b"), True),
        (InputNamed("a"), use(extra_inputs="b"), False),
        (InputNamed("a", "data_file_keys"), use(extra_inputs="a"), False),
        (ParameterSet("zero_cond_t"), use(zero_cond_t=True), True),
        (ParameterSet("processor_path"), use(processor_path="folder"), True),
        (ParameterSet("processor_path"), use(), False),
        (ParameterSet("encodes_only"), use(task="sft:data_process"), True),
        (ParameterSet("audio_loss_weight"), use(), False),
        (ParameterSet("audio_loss_weight"), use(audio_loss_weight=0.0), True),
        (ModelListed("net"), use({"net": {}}), True),
        (ModelListed("net"), use({"dit": SMALL}), None),
        (ModelListed("net"), use({"dit": SMALL, "vae": {}}), False),
        (ModelHas("dit", lambda shapes: "a.weight" in shapes), use({"dit": SMALL}), True),
        (ModelHas("dit", lambda shapes: "b.weight" in shapes), use({"dit": SMALL}), False),
        (ModelHas("dit", lambda shapes: "a.weight" in shapes), use({"dit": {}}), None),
        (ModelHas("dit", lambda shapes: "a.weight" in shapes), use(), None),
        (ModelsDiffer(("dit", rows), ("net", rows)), use({"dit": SMALL}), None),
        (ModelsDiffer(("dit", rows), ("net", rows)), use({"dit": SMALL, "net": {}}), None),
        (ModelsDiffer(("dit", rows), ("net", rows)), use({"dit": SMALL, "net": SMALL}), False),
        (ModelsDiffer(("dit", rows), ("net", columns)), use({"dit": SMALL, "net": SMALL}), True),
    ],
)
def test_a_condition_may_not_be_known_yet(
    condition: Condition, situation: Use, holds: bool | None
) -> None:
    assert condition.holds(situation) is holds


def test_what_is_not_known_refuses_nothing() -> None:
    net, named = ModelListed("net"), InputNamed("a")
    needs = Refusal("a needs the net", "add it", when=(named,), unless=(net,))
    unused = Refusal("the net needs a", "name it", when=(net,), unless=(named,))
    check_refusals((needs, unused), use(extra_inputs="a"))
    check_refusals((needs, unused), use({"dit": SMALL}))
    with pytest.raises(ParameterError, match="a needs the net") as error:
        check_refusals((unused, needs), use({"dit": SMALL, "vae": SMALL}, extra_inputs="a"))
    assert (error.value.where, error.value.do) == ("extra_inputs", "add it")


def test_makers_of_refusals_name_what_is_missing() -> None:
    refusals = (
        *column_and_model("a", "net", "net"),
        column_needs("b", "a"),
        columns_exclude("a", "c"),
    )
    both = {"dit": SMALL, "net": SMALL}
    for situation, what in (
        (use({"dit": SMALL, "vae": SMALL}, extra_inputs="a"), "a is given but no net"),
        (use(both), "the model list has a net, but a is not given"),
        (use(both, extra_inputs="b,c"), "the model list has a net, but a is not given"),
        (use(extra_inputs="b"), "b is given but not a"),
        (use(both, extra_inputs="a,b,c"), "a and c do not go together"),
    ):
        with pytest.raises(ParameterError) as error:
            check_refusals(refusals, situation)
        assert error.value.what == what
        assert error.value.where == "extra_inputs"
    check_refusals(refusals, use(both, extra_inputs="a,b"))
    # Where everything is only encoded nothing reads the column.
    check_refusals(refusals, use({"dit": SMALL, "vae": SMALL}, extra_inputs="a", **ENCODES))


@pytest.mark.parametrize("family", each_family(), ids=lambda family: family.name)
def test_refusals_name_what_the_family_has(family: Family) -> None:
    components = {component.name for component in family.components}
    for refusal in family.refusals:
        for condition in (*refusal.when, *refusal.unless):
            if isinstance(condition, InputNamed):
                assert condition.column in family.extra_inputs
            elif isinstance(condition, ModelListed | ModelHas):
                assert condition.component in components
            elif isinstance(condition, EntryNamed):
                re.compile(condition.pattern)
            elif isinstance(condition, ModelsDiffer):
                assert {condition.one[0], condition.other[0]} <= components
            else:
                assert isinstance(condition, ParameterSet)
                assert hasattr(use().config, condition.name)
