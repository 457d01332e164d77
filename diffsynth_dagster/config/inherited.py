"""Parameters that an earlier step has already used: a later step takes them over, or must agree."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffsynth_dagster.config.affects import settled_by_encoding
from diffsynth_dagster.config.parameters import MARKS, TrainingConfig
from diffsynth_dagster.errors import ParameterError
from diffsynth_dagster.fingerprint import Fingerprint


def take_over(
    config: TrainingConfig, settled: Mapping[str, Any], what: str, where: str
) -> TrainingConfig:
    """The config with the values of an earlier step for the parameters that it leaves out.

    Args:
        settled: the earlier step's values: parameter name → JSON value.
        what: what was done with these values, for messages: "the data set was encoded".
        where: where the values are from, for messages.

    Raises:
        ParameterError: the config gives another value than the earlier step.
    """
    default = settled_by_encoding(TrainingConfig.model_validate({}))
    # A value that equals `Mark.left_out_as` may have been None in the earlier step. Nobody can
    # tell, so it is neither taken over nor compared.
    known = {
        name: value
        for name, value in settled.items()
        if name in MARKS and not _is_ambiguous(name, value)
    }
    asked = settled_by_encoding(config)
    # A parameter at its default counts as left out, since a config does not show which were given.
    given = [n for n in asked if n in known and (_is_given(config, n) or asked[n] != default[n])]
    do = "leave it out, or do that step again with it"
    require_same({name: asked[name] for name in given}, known, what, where, do)
    return TrainingConfig.model_validate({**config.model_dump(), **known})


def _is_ambiguous(name: str, value: object) -> bool:
    """Whether this value is recorded both when it was given and when it was left out."""
    return MARKS[name].left_out_as is not None and value == MARKS[name].left_out_as


def _is_given(config: TrainingConfig, name: str) -> bool:
    """Whether a config certainly gives a value. Only parameters with `left_out_as` show that: they
    are None when left out."""
    return MARKS[name].left_out_as is not None and getattr(config, name) is not None


def named_data(config: TrainingConfig) -> dict[str, str]:
    """The data set that a config names: parameter name → absolute path."""
    table = config.dataset_metadata_path
    paths = {"dataset_base_path": config.dataset_base_path, "dataset_metadata_path": table}
    return {name: str(Path(path).absolute()) for name, path in paths.items() if path is not None}


def require_same(
    given: Mapping[str, Any], settled: Mapping[str, Any], what: str, where: str, do: str
) -> None:
    """Refuse to use the result of an earlier step that had other values.

    Args:
        given: the values of now, by name.
        settled: the values of the earlier step, by name.
        what: what was done with those, for messages: "the table was checked".
        where: where they are from, for messages.
        do: what the user can do.

    Raises:
        ParameterError: a value differs.
    """
    for name in Fingerprint(given).differs(Fingerprint(settled), given):
        raise ParameterError(
            f"{what} with {name} = {settled.get(name)}, and now it is {given[name]}",
            where=where,
            do=do,
        )
