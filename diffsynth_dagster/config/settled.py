"""What an earlier step has settled: a later one takes it over, or must not ask for anything else."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffsynth_dagster.config.effect import settled_by_encoding
from diffsynth_dagster.config.parameters import MARKS, TrainingConfig
from diffsynth_dagster.errors import ParameterError
from diffsynth_dagster.fingerprint import Fingerprint


def take_over(
    config: TrainingConfig, settled: Mapping[str, Any], what: str, where: str
) -> TrainingConfig:
    """The config with what was settled in place of what it leaves out.

    A switch that was settled as what None is written as (see `Mark.left_out_as`) may have been left
    out: the config keeps its own.

    Args:
        settled: parameter name → JSON value.
        what: what was done with these values, for messages: "the data set was encoded".

    Raises:
        ParameterError: the config asks for something else.
    """
    default = settled_by_encoding(TrainingConfig.model_validate({}))
    known = {n: value for n, value in settled.items() if n in MARKS and not _is_unsaid(n, value)}
    asked = settled_by_encoding(config)
    said = [n for n in asked if n in known and (_is_given(config, n) or asked[n] != default[n])]
    do = "leave it out, or do that step again with it"
    require_same({name: asked[name] for name in said}, known, what, where, do)
    return TrainingConfig.model_validate({**config.model_dump(), **known})


def _is_unsaid(name: str, value: object) -> bool:
    """Whether a value is written both where it was given and where it was left out."""
    return MARKS[name].left_out_as is not None and value == MARKS[name].left_out_as


def _is_given(config: TrainingConfig, name: str) -> bool:
    """Whether a config surely gives a value, be it that of leaving it out."""
    return MARKS[name].left_out_as is not None and getattr(config, name) is not None


def named_data(config: TrainingConfig) -> dict[str, str]:
    """The data set that a config names, as absolute paths."""
    table = config.dataset_metadata_path
    paths = {"dataset_base_path": config.dataset_base_path, "dataset_metadata_path": table}
    return {name: str(Path(path).absolute()) for name, path in paths.items() if path is not None}


def require_same(
    given: Mapping[str, Any], settled: Mapping[str, Any], what: str, where: str, do: str
) -> None:
    """Refuse to go on with what an earlier step made from other values, whether left out or not.

    Args:
        given, settled: name → value of what is asked for now, and of what the step was given.
        what: what was done, for messages: "the table was checked".

    Raises:
        ParameterError: a value differs.
    """
    for name in Fingerprint(given).differs(Fingerprint(settled), given):
        raise ParameterError(
            f"{what} with {name} = {settled.get(name)}, and now it is {given[name]}",
            where=where,
            do=do,
        )
