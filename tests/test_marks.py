"""Every parameter in turn: what changes with it is what its mark says, for each family.

A new parameter joins with a row in `parameter_changes.ALTERNATIVES` (or `file_changes.file_change`, if it
counts by content).
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from conftest import Values, make_config, train_to_end
from family_case import Case
from file_changes import file_change
from parameter_changes import (
    ALTERNATIVES,
    BEFORE,
    BY_CONTENT,
    BY_VALUE,
    CASES,
    NAMED,
    PLANNED,
    REFUSED,
    STALE,
    Change,
    Place,
    with_columns,
)
from pydantic import BaseModel

from assets.common import code_version
from diffsynth_dagster.config import TrainingConfig
from diffsynth_dagster.config.affects import (
    AFFECTS,
    names_that_affect,
    settled_by_encoding,
    values_that_affect,
)
from diffsynth_dagster.config.declare import marks_of, parameter
from diffsynth_dagster.config.family_specific import FamilySpecificParameters
from diffsynth_dagster.config.inherited import take_over
from diffsynth_dagster.config.parameters import MARKS
from diffsynth_dagster.errors import UserError
from diffsynth_dagster.families import find_family
from diffsynth_dagster.weights.hub import ModelHub


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Place]:
    return {}


@pytest.fixture
def place(
    request: pytest.FixtureRequest,
    places: dict[str, Place],
    tmp_path_factory: pytest.TempPathFactory,
) -> Place:
    case: Case = request.param
    if case.name not in places:
        folder = tmp_path_factory.mktemp(case.name)
        alike = [p for p in places.values() if p.case.family == case.family]
        if alike:
            (folder / "model").symlink_to(alike[0].model)
        else:
            case.write(folder / "model")
        with_columns(case.rows(folder / "data"))
        for name in ("one", "same", "two"):
            path = folder / f"{name}.safetensors"
            path.write_bytes(b"two" if name == "two" else b"one")
        places[case.name] = Place(case, folder, ModelHub(folder / "hub", skip_download=True))
    return places[case.name]


IN_SHORT = ("qwen_image", "wan_t2v")
"""One family of pictures and one of clips; the others are in `make soak`."""
every_case = pytest.mark.parametrize(
    "place",
    [
        pytest.param(c, id=c.name, marks=() if c.name in IN_SHORT else pytest.mark.soak)
        for c in CASES
    ],
    indirect=True,
)


def resolved(change: Change, place: Place) -> Mapping[str, Any]:
    return change(place) if callable(change) else change


def changed_names(place: Place, one: Mapping[str, Any], other: Mapping[str, Any]) -> set[str]:
    values = [make_config(place.values(v)).model_dump() for v in (one, other)]
    return {name for name in values[0] if values[0][name] != values[1][name]}


def require_marked(place: Place, before: Mapping[str, Any], after: Mapping[str, Any]) -> None:
    """Fail unless what changes is what the marks of the parameters that differ say."""
    names = changed_names(place, before, after)
    marks = [MARKS[name] for name in names]
    one, other = place.outcome(**before), place.outcome(**after)
    stale = [(NAMED if m.by_content else STALE)[m.affects] for m in marks]
    assert one.changed_versions(other) == set().union(*stale)
    by_value = {m.affects for m in marks if not m.by_content}
    assert (one.identity != other.identity) == bool(by_value - {"exports", "nothing"})
    if not by_value - {"training", "exports", "nothing"}:
        assert one.keys == other.keys


@every_case
@pytest.mark.parametrize("name", BY_VALUE)
def test_a_value_changes_what_its_mark_says(place: Place, name: str) -> None:
    before = resolved(BEFORE.get(name, {}), place)
    after = resolved(ALTERNATIVES[name], place)
    words = refusal(place, name)
    if words is not None:
        with pytest.raises(UserError, match=words):
            place.outcome(**after)
        return
    assert name in changed_names(place, before, after)
    require_marked(place, before, after)


@every_case
@pytest.mark.parametrize("name", BY_CONTENT)
def test_a_file_counts_by_its_content(place: Place, name: str) -> None:
    change = file_change(place, name)
    words = refusal(place, name)
    if words is not None:
        with pytest.raises(UserError, match=words):
            place.outcome(**change.renamed)
        return
    assert name in changed_names(place, change.before, change.renamed)
    require_marked(place, change.before, change.renamed)
    if change.changed is None:
        return
    one, other = place.outcome(**change.renamed), place.outcome(**change.changed)
    assert one.identity != other.identity
    assert (one.keys != other.keys) == (MARKS[name].affects != "training")


def refusal(place: Place, name: str) -> str | None:
    """Words of the message with which a case refuses a parameter; None if it takes it."""
    family = find_family(place.case.family)
    if name in FamilySpecificParameters.model_fields and name not in family.parameters:
        return f"{family.name} takes no {name}"
    return REFUSED.get(place.case.name, {}).get(name)


@pytest.mark.parametrize("name", PLANNED)
def test_what_is_planned_is_refused(name: str) -> None:
    with pytest.raises(UserError, match=f"'{name}' is not supported yet"):
        make_config(dict(resolved(ALTERNATIVES[name], None)))  # pyright: ignore


def test_a_parameter_without_a_mark_is_an_error() -> None:
    class Group(BaseModel):
        marked: int = parameter(1, "Says what it affects.", affects="rows")
        bare: int = 1

    with pytest.raises(TypeError, match="'bare' does not say what it affects"):
        marks_of(Group)


def test_the_marks_are_the_fields_and_hold_each_kind() -> None:
    assert MARKS.keys() == TrainingConfig.model_fields.keys()
    assert {mark.affects for mark in MARKS.values()} == set(AFFECTS)
    for mark in MARKS.values():
        assert mark.needs is None or mark.needs in MARKS
    values = values_that_affect(TrainingConfig(task="sft:train"), *AFFECTS)
    off = {name for name, mark in MARKS.items() if mark.off_by_default}
    assert values.keys() == {n for n, mark in MARKS.items() if not mark.by_content} - off
    assert values["task"] == "sft"


def test_what_encoding_settles_may_be_left_out_or_given_again(values: Values) -> None:
    """The parameters that the second half of split training takes over from the first."""
    settled = settled_by_encoding(
        make_config(values(height=32, width=32, zero_cond_t=True, metadata_encoding="utf-8-sig"))
    )
    second = {"task": "sft:train", "dataset_metadata_path": None}
    for given in ({}, settled):
        config = make_config(values(**second, **given))
        taken = take_over(config, settled, "the data set was encoded", "the test")
        assert settled_by_encoding(taken) == settled
        assert taken.task == "sft:train"
        assert taken.lora_base_model == config.lora_base_model
    each_half = {name for name, mark in MARKS.items() if mark.each_half}
    assert not {*each_half, *BY_CONTENT} & settled.keys()
    other = make_config(values(**second, height=64, width=64))
    with pytest.raises(UserError, match="encoded with height = 32, and now it is 64"):
        take_over(other, settled, "the data set was encoded", "the test")


def test_recipes_of_two_families_have_different_metadata() -> None:
    """Which columns are read is told from the model list where no family is given."""
    data = {"dataset_base_path": "d", "dataset_metadata_path": "m.csv", "lora_base_model": "dit"}
    models = ("Qwen/Qwen-Image:transformer/*.safetensors", "Wan-AI/Wan2.1-T2V-14B:*.safetensors")
    configs = [make_config({**data, "model_id_with_origin_paths": [model]}) for model in models]
    versions = {code_version(config, "metadata") for config in configs}
    assert len(versions) == 2


def test_a_training_does_not_depend_on_what_affects_exports_or_nothing(
    values: Values, tmp_path: Path
) -> None:
    """Whole checkpoints are compared, with the provenance in their headers."""
    watched = {
        "cache_path": str(tmp_path / "cache"),
        "dataset_num_workers": 1,
        "enable_csv_log": True,
        "initialize_model_on_cpu": True,
        "swanlab_project": "another",
        "verify_content": True,
        "wandb_project": "another",
    }
    assert all(MARKS[name].affects == "nothing" for name in watched)
    written: list[bytes] = []
    for name, more in (("plain", {}), ("watched", watched)):
        run = train_to_end(values(**more), tmp_path / name)
        written.append((run / "epoch-0.safetensors").read_bytes())
    assert written[0] == written[1]


def test_what_is_off_by_default_makes_no_older_result_out_of_date() -> None:
    """Nothing says its name while it is off, so that digests are those of before it was there."""
    off = {name for name, mark in MARKS.items() if mark.off_by_default}
    config = TrainingConfig(timestep_sampling="mode")
    assert off & values_that_affect(config, *AFFECTS).keys() == {"timestep_sampling"}
    assert not off & names_that_affect(config, *AFFECTS).keys()
