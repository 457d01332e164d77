"""`train_<recipe>`: a recipe's assets and the weights they come from."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import dagster as dg

from assets.automation import own_keys
from assets.common import KINDS, asset_key
from assets.data import data_key
from assets.prefix import Prefix
from assets.weights import weights_keys
from diffsynth_dagster.config import Recipe
from jobs.launchpad import broken_launch_config, launch_config
from resources import BrokenRecipe, run_executor

if TYPE_CHECKING:
    from dagster._core.definitions.unresolved_asset_job_definition import (
        UnresolvedAssetJobDefinition as AssetJob,
    )


def job_name(recipe: str) -> str:
    """Name of the job that trains a recipe."""
    return f"train_{recipe}"


def make_jobs(
    recipes: Sequence[Recipe],
    broken: Sequence[BrokenRecipe] = (),
    prefix: Prefix = Prefix(),  # noqa: B008 - it does not change
) -> "list[AssetJob]":
    """One job for each recipe: its own assets and the weights they come from. What it reads from other
    recipes is taken as it is: their jobs train them."""
    jobs: list[AssetJob] = []
    for recipe in recipes:
        selection = prefix.selection([*_own_keys(recipe), *weights_keys(recipe)])
        jobs.append(_make_job(recipe, selection, launch_config(recipe, prefix), prefix))
    for recipe in broken:
        selection = prefix.selection(asset_key(recipe.name, kind) for kind in KINDS)
        jobs.append(_make_job(recipe, selection, broken_launch_config(), prefix))
    return jobs


def _own_keys(recipe: Recipe) -> list[dg.AssetKey]:
    """What a recipe has of its own. Its files are listed only where that is of use."""
    keys, data = own_keys(recipe), data_key(recipe)
    return keys if recipe.options.retrain is not None else [key for key in keys if key != data]


def run_tags(recipe: Recipe) -> dict[str, str]:
    """Tags of the runs that train a recipe, whatever starts them."""
    return dict(recipe.options.tags)


def _make_job(
    recipe: Recipe | BrokenRecipe,
    selection: dg.AssetSelection,
    config: dg.ConfigMapping,
    prefix: Prefix,
) -> "AssetJob":
    sound = isinstance(recipe, Recipe)
    return dg.define_asset_job(
        prefix.name(job_name(recipe.name)),
        selection=selection,
        description=recipe.options.description if sound else str(recipe.error),
        config=config,
        tags=run_tags(recipe) if sound else None,
        # Not in the code location, where it would run the assets of others too. The steps of a recipe
        # form a line, and what is heavy in them runs in processes of its own: a process for each step
        # would only add seconds, and a generation between whoever kills a run and the training that
        # must die with it.
        executor_def=run_executor,
    )
