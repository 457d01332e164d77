"""`train_<recipe>`: the job that makes a recipe's assets and the weights that it uses."""

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
    """Name of a recipe's job, without a prefix."""
    return f"train_{recipe}"


def make_jobs(
    recipes: Sequence[Recipe],
    broken: Sequence[BrokenRecipe] = (),
    prefix: Prefix = Prefix(),  # noqa: B008 - it does not change
) -> "list[AssetJob]":
    """One job for each recipe, with its assets and weights. Assets of other recipes that it reads
    are not part of it: their own jobs make them."""
    jobs: list[AssetJob] = []
    for recipe in recipes:
        selection = prefix.selection([*_own_keys(recipe), *weights_keys(recipe)])
        jobs.append(_make_job(recipe, selection, launch_config(recipe, prefix), prefix))
    for recipe in broken:
        selection = prefix.selection(asset_key(recipe.name, kind) for kind in KINDS)
        jobs.append(_make_job(recipe, selection, broken_launch_config(), prefix))
    return jobs


def _own_keys(recipe: Recipe) -> list[dg.AssetKey]:
    """The recipe's assets in its job. `<recipe>/data` is left out without `retrain`, since nobody
    waits for the listing then."""
    keys, data = own_keys(recipe), data_key(recipe)
    return keys if recipe.options.retrain is not None else [key for key in keys if key != data]


def run_tags(recipe: Recipe) -> dict[str, str]:
    """Tags of the runs of a recipe, whether a person, a schedule or a sensor starts them."""
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
        # Set on the job, not in `Definitions`, where it would also apply to other people's assets.
        # In-process, since the steps of a recipe form a line and their heavy work runs in processes
        # of its own. A process for each step would only add seconds, and one more process between
        # whoever kills a run and the training that must die with it.
        executor_def=run_executor,
    )
