"""`train_<recipe>`: everything that a recipe's exports depend on; and its schedule."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import dagster as dg

from assets.common import asset_key
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
    """One job for each recipe: its assets and the weights they come from."""
    return [
        *(_make_job(r.name, r.options.description, _last_asset(r)) for r in recipes),
        *(_make_job(r.name, str(r.error), asset_key(r.name, "exports")) for r in broken),
    ]


def _make_job(name: str, description: str, last: dg.AssetKey) -> "AssetJob":
    selection = dg.AssetSelection.assets(last).upstream()
    return dg.define_asset_job(
        job_name(name), selection=selection, description=description, config=JOB_CONFIG
    )


def _last_asset(recipe: Recipe) -> dg.AssetKey:
    only_encodes = recipe.config.encodes_only
    return asset_key(recipe.name, "latents" if only_encodes else "exports")


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
