"""The assets of a recipe: weights, data → metadata → latents → checkpoints → exports → promoted."""

from collections.abc import Sequence

import dagster as dg

from assets.automation import with_automation
from assets.broken import make_broken
from assets.checkpoints import make_checkpoints
from assets.common import asset_key, kinds_of
from assets.data import make_data
from assets.exports import make_exports
from assets.latents import make_latents
from assets.lineage import Lineage
from assets.metadata import make_metadata
from assets.promoted import make_promoted
from assets.weights import WeightsAssets, weights_keys
from diffsynth_dagster.config import Recipe
from resources import BrokenRecipe

__all__ = ["make_assets", "with_automation"]


def make_assets(
    recipes: Sequence[Recipe], broken: Sequence[BrokenRecipe] = ()
) -> list[dg.AssetsDefinition]:
    """All assets of the recipes. Weights that several recipes use are a single asset."""
    lineage = Lineage(recipes)
    assets = list(WeightsAssets(recipes, lineage).definitions)
    for recipe in recipes:
        kinds, models = kinds_of(recipe.config), weights_keys(recipe)
        tables, latents, checkpoints = (
            lineage.upstream(recipe, kind) for kind in ("metadata", "latents", "checkpoints")
        )
        # `task: sft:data_process` has no checkpoints, a training from encoded samples no latents.
        if "latents" in kinds:
            assets.append(make_data(recipe))
            assets.append(make_metadata(recipe, [asset_key(recipe.name, "data"), *tables]))
            assets.append(make_latents(recipe, [*models, *latents]))
        if "checkpoints" in kinds:
            assets += [make_checkpoints(recipe, [*models, *checkpoints]), make_exports(recipe)]
            assets.append(make_promoted(recipe))
    # A broken recipe still has its assets, so that its mistake shows in the UI.
    for recipe in broken:
        assets += make_broken(recipe)
    return assets
