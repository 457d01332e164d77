"""The recipe key `retrain`: when a recipe is trained again automatically."""

from collections.abc import Mapping
from typing import Any, Literal, cast

from pydantic import BaseModel, ConfigDict, Field

from diffsynth_dagster.config.validate import as_key, validated
from diffsynth_dagster.errors import ParameterError, nearest

_EXAMPLE = 'write it like `retrain: {cron: "0 3 * * *"}`'


class Retrain(BaseModel):
    """The recipe key `retrain`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    cron: str | None = Field(
        None, description="Cron expression: minute, hour, day of month, month, day of week."
    )
    timezone: str = Field("UTC", description="Name of the time zone of `cron`, such as Asia/Tokyo.")
    when: Literal["changed", "always"] = Field(
        "changed",
        description="changed: at each time of `cron`, only what has changed since it was made is made "
        "again; always: a whole training each time.",
    )
    files: bool = Field(
        False,
        description="Train again when files of the data set have changed, once they stay the same.",
    )
    settle_minutes: float = Field(
        5.0, ge=0, description="How long the files must stay the same before that, in minutes."
    )

    warm_start: bool = Field(
        False,
        description="Start each training from the promoted version, if there is one, instead of from the "
        "beginning.",
    )

    @property
    def nightly(self) -> bool:
        """Whether what has changed is made again at the times of `cron`."""
        return self.cron is not None and self.when == "changed"


def as_retrain(value: object, where: str) -> Retrain:
    """Read and check the value of the key `retrain`.

    The cron expression and the time zone are not checked here, since that needs Dagster.

    Raises:
        ParameterError: the value is not a mapping, has an unknown key or a wrong value, has keys
            that contradict each other, or says neither `cron` nor `files`.
    """

    def refuse(what: str, do: str) -> ParameterError:
        return ParameterError(what, where=where, do=do)

    if not isinstance(value, Mapping):
        raise refuse("'retrain' is not a mapping", _EXAMPLE)
    values = {str(key): item for key, item in cast(Mapping[Any, Any], value).items()}
    for name in values:
        if name not in Retrain.model_fields:
            hint = nearest(name, Retrain.model_fields)
            raise refuse(
                f"unknown key '{name}' in 'retrain'" + (f"; {hint}" if hint else ""),
                f"its keys are {', '.join(Retrain.model_fields)}",
            )
    retrain = validated(Retrain, values, f"{where}: 'retrain'", as_key)
    if retrain.cron is None and not retrain.files:
        raise refuse(
            "'retrain' says neither 'cron' nor 'files'", f"{_EXAMPLE}, or with files: true"
        )
    if retrain.when == "always" and retrain.files:
        raise refuse(
            "'retrain' has 'when: always', which trains whether files have changed or not, and 'files'",
            "leave one of them out",
        )
    # By the keys that are written, since a value may equal its default.
    if "timezone" in values and retrain.cron is None:
        raise refuse("'retrain' has 'timezone' and no 'cron'", "add it, or leave it out")
    if "settle_minutes" in values and not retrain.files:
        raise refuse(
            "'retrain' has 'settle_minutes' and no 'files: true'", "add it, or leave it out"
        )
    return retrain


def refuse_schedule(values: Mapping[str, Any], where: str) -> None:
    """Refuse the old key `schedule`, which `retrain` has replaced. Raises `ParameterError`."""
    if "schedule" in values:
        raise ParameterError(
            "'schedule' is now `retrain: {cron: …}`",
            where=where,
            do=f'write `retrain: {{cron: "{values["schedule"]}"}}` in its place; it is on as soon as the '
            "definitions are loaded",
        )
