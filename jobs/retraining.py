"""The schedules and sensors of recipes with `retrain`, which start trainings automatically."""

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
from jobs.file_sensor import make_files_sensor, under_way
from jobs.training import job_name, run_tags
from resources import BrokenRecipe


@dataclass(frozen=True)
class Retraining:
    """Schedules and sensors that start runs. All are switched on by default."""

    schedules: list[dg.ScheduleDefinition]
    sensors: list[dg.SensorDefinition]


def make_retraining(
    recipes: Sequence[Recipe],
    broken: Sequence[BrokenRecipe] = (),
    prefix: Prefix = Prefix(),  # noqa: B008 - it does not change
) -> Retraining:
    """The schedules and sensors of the recipes.

    - `retrain_<recipe>`: a schedule that trains at each time of the cron, whether anything has
      changed or not. A broken recipe with a cron has one too: its runs fail with the reason.
    - `changed_<recipe>`: a sensor that remakes what has changed, at each time of the cron. Each
      recipe has its own, so that a slow one does not delay the others. `changed_weights` does the
      same for weights, which recipes share.
    - `files_<recipe>`: a sensor that starts a run when files have changed and then stayed the same.
    """
    # Schedules and sensors need different names: Dagster stores the state of both by name, and a
    # recipe may change from one to the other.
    settings = [(recipe, recipe.options.retrain) for recipe in recipes]
    schedules = [
        _schedule(recipe.name, retrain, always_config(recipe), prefix)
        for recipe, retrain in settings
        if retrain is not None and retrain.when == "always"
    ]
    for recipe in broken:
        retrain = recipe.retrain
        if retrain is not None and retrain.cron is not None:
            schedules.append(_schedule(recipe.name, retrain, {}, prefix))
    sensors: list[dg.SensorDefinition] = []
    nightly = [recipe for recipe, retrain in settings if retrain is not None and retrain.nightly]
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
        for recipe, retrain in settings
        if retrain is not None and retrain.files
    ]
    return Retraining(schedules, sensors)


def always_config(recipe: Recipe) -> Mapping[str, Any]:
    """Run config of a recipe's job that makes it train even if nothing has changed."""
    return {"retrain": True} if "checkpoints" in kinds_of(recipe.config) else {}


def _schedule(
    name: str, retrain: Retrain, config: Mapping[str, Any], prefix: Prefix
) -> dg.ScheduleDefinition:
    """The schedule `retrain_<recipe>`.

    Args:
        name: of the recipe.
        config: run config of its runs.
    """
    assert retrain.cron is not None, "a schedule has a cron"
    job = prefix.name(job_name(name))

    def begin(context: dg.ScheduleEvaluationContext) -> dg.RunRequest | dg.SkipReason:
        # Otherwise a training that outlasts the time between two ticks would pile up runs.
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
    assert retrain is not None, "a nightly recipe has 'retrain'"
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
