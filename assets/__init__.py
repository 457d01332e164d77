"""The assets of each recipe: weights → metadata → latents → checkpoints → exports."""

from collections.abc import Sequence

import dagster as dg

from assets.broken import make_broken
from assets.checkpoints import make_checkpoints
from assets.exports import make_exports
from assets.latents import make_latents
from assets.metadata import make_metadata
from assets.weights import WeightsAssets
from diffsynth_dagster.config import Recipe
from resources import BrokenRecipe

__all__ = ["make_assets"]


def make_assets(
    recipes: Sequence[Recipe], broken: Sequence[BrokenRecipe] = ()
) -> list[dg.AssetsDefinition]:
    """Every asset of the recipes. Weights that several recipes name are one asset.

    A recipe that only encodes (`task: sft:data_process`) ends with its latents; one that trains
    from an encoded folder (no `dataset_metadata_path`) starts with its checkpoints.
    """
    weights = WeightsAssets(recipes)
    assets = list(weights.definitions)
    for recipe in recipes:
        upstream = weights.keys(recipe)
        if recipe.config.dataset_metadata_path is not None:
            assets += [make_metadata(recipe), make_latents(recipe, upstream)]
        if not recipe.config.encodes_only:
            assets += [make_checkpoints(recipe, upstream), make_exports(recipe)]
    for recipe in broken:
        assets += make_broken(recipe)
    return assets
