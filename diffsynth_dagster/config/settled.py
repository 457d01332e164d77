"""What an earlier step has settled, and a later one takes over."""

from collections.abc import Mapping
from typing import Any

from diffsynth_dagster.config.effect import settled_by_encoding
from diffsynth_dagster.config.parameters import TrainingConfig
from diffsynth_dagster.errors import ParameterError


def take_over(
    config: TrainingConfig, settled: Mapping[str, Any], what: str, where: str
) -> TrainingConfig:
    """The config with what was settled in place of what it leaves out.

    Args:
        settled: parameter name → JSON value.
        what: what was done with these values, for messages: "the data set was encoded".

    Raises:
        ParameterError: the config asks for something else.
    """
    default = settled_by_encoding(TrainingConfig.model_validate({}))
    for name, value in settled_by_encoding(config).items():
        if name in settled and value not in (settled[name], default[name]):
            raise ParameterError(
                f"{what} with {name} = {settled[name]}, not {value}",
                where=where,
                do=f"leave {name} out, or do that step again with it",
            )
    known = {name: settled[name] for name in settled if name in TrainingConfig.model_fields}
    return TrainingConfig.model_validate({**config.model_dump(), **known})
