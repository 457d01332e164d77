"""`train_<recipe>`: a recipe's assets and the weights they come from; and its schedule."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import dagster as dg

from assets.common import KINDS, Kind, asset_key, kinds_of
from assets.weights import GROUP
from diffsynth_dagster.config import Recipe
from resources import JOB_CONFIG, BrokenRecipe

if TYPE_CHECKING:
    from dagster._core.definitions.unresolved_asset_job_definition import (
        UnresolvedAssetJobDefinition as AssetJob,
    )


def job_name(recipe: str) -> str:
    """Name of the job that trains a recipe."""
    return f"train_{recipe}"


def make_jobs(recipes: Sequence[Recipe], broken: Sequence[BrokenRecipe] = ()) -> "list[AssetJob]":
    """One job for each recipe: its own assets and the weights they come from. What it reads from other
    recipes is taken as it is: their jobs train them."""
    return [
        *(
            _make_job(r.name, r.options.description, kinds_of(r.config), run_tags(r))
            for r in recipes
        ),
        *(_make_job(r.name, str(r.error), KINDS) for r in broken),
    ]


def run_tags(recipe: Recipe) -> dict[str, str]:
    """Tags of the runs that train a recipe, whatever starts them."""
    return dict(recipe.options.tags)


def _make_job(
    name: str, description: str, kinds: Sequence[Kind], tags: Mapping[str, str] | None = None
) -> "AssetJob":
    own = dg.AssetSelection.assets(*(asset_key(name, kind) for kind in kinds))
    weights = own.upstream(depth=1) & dg.AssetSelection.groups(GROUP)
    return dg.define_asset_job(
        job_name(name),
        selection=own | weights,
        description=description,
        config=JOB_CONFIG,
        tags=tags,
    )


def make_schedules(
    recipes: Sequence[Recipe], jobs: "Sequence[AssetJob]"
) -> list[dg.ScheduleDefinition]:
    """One schedule for each recipe that asks for one; switched off until someone turns it on."""
    by_name = {job.name: job for job in jobs}
    return [
        dg.ScheduleDefinition(
            name=f"retrain_{recipe.name}",
            job=by_name[job_name(recipe.name)],
            cron_schedule=recipe.options.schedule,
            default_status=dg.DefaultScheduleStatus.STOPPED,
        )
        for recipe in recipes
        if recipe.options.schedule is not None
    ]
