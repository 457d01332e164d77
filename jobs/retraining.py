"""What trains recipes by itself: the schedules and sensors that `retrain` asks for."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import dagster as dg

from assets.automation import own_keys
from assets.common import kinds_of
from assets.prefix import Prefix
from assets.weights import GROUP, weights_keys
from diffsynth_dagster.config import Recipe
from diffsynth_dagster.config.retrain import Retrain
from jobs.settled import make_files_sensor, under_way
from jobs.training import job_name, run_tags
from resources import BrokenRecipe


@dataclass(frozen=True)
class Retraining:
    """What starts runs by itself. All of it is on as soon as the definitions are loaded."""

    schedules: list[dg.ScheduleDefinition]
    sensors: list[dg.SensorDefinition]


def make_retraining(
    recipes: Sequence[Recipe],
    broken: Sequence[BrokenRecipe] = (),
    prefix: Prefix = Prefix(),  # noqa: B008 - it does not change
) -> Retraining:
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
        _schedule(recipe.name, retrain, always_config(recipe), prefix)
        for recipe, retrain in asked
        if retrain is not None and retrain.when == "always"
    ]
    for recipe in broken:
        retrain = recipe.retrain
        if retrain is not None and retrain.cron is not None:
            schedules.append(_schedule(recipe.name, retrain, {}, prefix))
    sensors: list[dg.SensorDefinition] = []
    nightly = [recipe for recipe, retrain in asked if retrain is not None and retrain.nightly]
    sensors += [_changed_sensor(recipe, prefix) for recipe in nightly]
    weights = list(dict.fromkeys(key for recipe in nightly for key in weights_keys(recipe)))
    if weights:
        sensors.append(
            _automation_sensor(
                GROUP,
                weights,
                prefix,
                "Makes the weights of the recipes that are trained anew each night, where they are missing "
                "or have changed.",
            )
        )
    sensors += [
        make_files_sensor(recipe, retrain, prefix)
        for recipe, retrain in asked
        if retrain is not None and retrain.files
    ]
    return Retraining(schedules, sensors)


def always_config(recipe: Recipe) -> Mapping[str, Any]:
    """Run config of a recipe's job that trains although nothing has changed."""
    return {"retrain": True} if "checkpoints" in kinds_of(recipe.config) else {}


def _schedule(
    name: str, retrain: Retrain, config: Mapping[str, Any], prefix: Prefix
) -> dg.ScheduleDefinition:
    assert retrain.cron is not None, "a schedule has times"
    job = prefix.name(job_name(name))

    def begin(context: dg.ScheduleEvaluationContext) -> dg.RunRequest | dg.SkipReason:
        run = under_way(context.instance, job)
        if run is not None:
            return dg.SkipReason(f"the run {run} of this recipe is not done yet")
        return dg.RunRequest(run_config=dict(config))

    return dg.ScheduleDefinition(
        name=prefix.name(f"retrain_{name}"),
        job_name=job,
        cron_schedule=retrain.cron,
        execution_timezone=retrain.timezone,
        execution_fn=begin,
        default_status=dg.DefaultScheduleStatus.RUNNING,
    )


def _changed_sensor(recipe: Recipe, prefix: Prefix) -> dg.SensorDefinition:
    retrain = recipe.options.retrain
    assert retrain is not None, "it is nightly"
    return _automation_sensor(
        recipe.name,
        own_keys(recipe),
        prefix,
        f"Makes anew what has changed, at the times {retrain.cron} ({retrain.timezone}).",
        run_tags(recipe),
    )


def _automation_sensor(
    name: str,
    keys: Sequence[dg.AssetKey],
    prefix: Prefix,
    description: str,
    tags: Mapping[str, str] | None = None,
) -> dg.AutomationConditionSensorDefinition:
    return dg.AutomationConditionSensorDefinition(
        prefix.name(f"changed_{name}"),
        target=prefix.selection(keys),
        run_tags=tags,
        description=description,
        default_status=dg.DefaultSensorStatus.RUNNING,
    )
