"""What trains recipes by itself: the schedules and sensors that `retrain` asks for."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import dagster as dg

from assets.automation import conditions_of, own_keys
from assets.common import asset_key, kinds_of
from assets.weights import GROUP
from diffsynth_dagster.config import Recipe
from diffsynth_dagster.config.retrain import Retrain
from jobs.settled import make_files_sensor
from jobs.training import job_name
from resources import JOB_CONFIG, BrokenRecipe


@dataclass(frozen=True)
class Retraining:
    """What starts runs by itself. All of it is on as soon as the definitions are loaded."""

    schedules: list[dg.ScheduleDefinition]
    sensors: list[dg.SensorDefinition]


def make_retraining(recipes: Sequence[Recipe], broken: Sequence[BrokenRecipe] = ()) -> Retraining:
    """The schedules and sensors of the recipes.

    - `retrain_<recipe>`: a schedule that trains at each time of the cron, whatever has changed. One that
      broke has it too, in the place of what it had before, so that its runs fail with the reason.
    - `changed_<recipe>`: a sensor that makes anew what has changed, at each time of the cron. It has
      another name, since Dagster keeps the state of both under the name. Each recipe has its own, so
      that none holds up the others, and so have the weights, which they share.
    - `files_<recipe>`: a sensor that waits for files to lie still.
    """
    asked = [(recipe, recipe.options.retrain) for recipe in recipes]
    schedules = [
        _schedule(recipe.name, retrain, always_config(recipe))
        for recipe, retrain in asked
        if retrain is not None and retrain.when == "always"
    ]
    for recipe in broken:
        retrain = recipe.retrain
        if retrain is not None and retrain.cron is not None:
            schedules.append(_schedule(recipe.name, retrain, JOB_CONFIG))
    sensors: list[dg.SensorDefinition] = []
    nightly = [recipe for recipe, retrain in asked if retrain is not None and retrain.nightly]
    sensors += map(_changed_sensor, nightly)
    weights = [key for key in conditions_of(nightly) if key.path[0] == GROUP]
    if weights:
        sensors.append(
            _automation_sensor(
                GROUP,
                weights,
                "Makes the weights of the recipes that are trained anew each night, where they are missing "
                "or have changed.",
            )
        )
    sensors += [
        make_files_sensor(recipe, retrain)
        for recipe, retrain in asked
        if retrain is not None and retrain.files
    ]
    return Retraining(schedules, sensors)


def always_config(recipe: Recipe) -> Mapping[str, Any]:
    """Run config of a recipe's job that trains although nothing has changed."""
    if "checkpoints" not in kinds_of(recipe.config):
        return JOB_CONFIG
    step = asset_key(recipe.name, "checkpoints").to_python_identifier()
    return {**JOB_CONFIG, "ops": {step: {"config": {"retrain": True}}}}


def run_tags(recipe: Recipe) -> Mapping[str, str]:
    """Tags of the runs that the sensor of a recipe asks for; those of its job's runs are the job's."""
    del recipe
    return {}


def _schedule(name: str, retrain: Retrain, config: Mapping[str, Any]) -> dg.ScheduleDefinition:
    assert retrain.cron is not None, "a schedule has times"
    return dg.ScheduleDefinition(
        name=f"retrain_{name}",
        job_name=job_name(name),
        cron_schedule=retrain.cron,
        execution_timezone=retrain.timezone,
        run_config=config,
        default_status=dg.DefaultScheduleStatus.RUNNING,
    )


def _changed_sensor(recipe: Recipe) -> dg.SensorDefinition:
    retrain = recipe.options.retrain
    assert retrain is not None, "it is nightly"
    return _automation_sensor(
        recipe.name,
        own_keys(recipe),
        f"Makes anew what has changed, at the times {retrain.cron} ({retrain.timezone}).",
        run_tags(recipe),
    )


def _automation_sensor(
    name: str, keys: Sequence[dg.AssetKey], description: str, tags: Mapping[str, str] | None = None
) -> dg.AutomationConditionSensorDefinition:
    return dg.AutomationConditionSensorDefinition(
        f"changed_{name}",
        target=dg.AssetSelection.assets(*keys),
        run_tags=tags,
        description=description,
        default_status=dg.DefaultSensorStatus.RUNNING,
    )
