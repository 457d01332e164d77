"""`train_<recipe>`: a recipe's assets and the weights they come from."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import dagster as dg

from assets.automation import own_keys
from assets.common import KINDS, asset_key
from assets.data import data_key
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
        *(_make_job(r.name, r.options.description, _own_keys(r)) for r in recipes),
        *(
            _make_job(r.name, str(r.error), [asset_key(r.name, kind) for kind in KINDS])
            for r in broken
        ),
    ]


def _own_keys(recipe: Recipe) -> list[dg.AssetKey]:
    """What a recipe has of its own. Its files are listed only where that is of use."""
    keys = own_keys(recipe)
    return (
        keys if recipe.options.retrain is not None else [k for k in keys if k != data_key(recipe)]
    )


def _make_job(name: str, description: str, keys: Sequence[dg.AssetKey]) -> "AssetJob":
    own = dg.AssetSelection.assets(*keys)
    weights = own.upstream(depth=1) & dg.AssetSelection.groups(GROUP)
    return dg.define_asset_job(
        job_name(name), selection=own | weights, description=description, config=JOB_CONFIG
    )
