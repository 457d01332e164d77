"""Assets of a broken recipe: they have the recipe's asset keys and fail with its error."""

import dagster as dg

from assets.common import KINDS, Kind, asset_key, user_errors
from assets.launched import RECIPE
from resources import BrokenRecipe


def make_broken(recipe: BrokenRecipe) -> list[dg.AssetsDefinition]:
    """The assets of a broken recipe, in one line from metadata to promoted."""
    assets: list[dg.AssetsDefinition] = []
    # Its parameters are unknown, so it gets every kind of asset, each depending on the one before.
    for before, kind in zip((None, *KINDS), KINDS, strict=False):
        deps = [asset_key(recipe.name, before)] if before else []
        assets.append(_make(recipe, kind, deps))
    return assets


def _make(recipe: BrokenRecipe, kind: Kind, deps: list[dg.AssetKey]) -> dg.AssetsDefinition:
    @dg.asset(
        key=asset_key(recipe.name, kind),
        deps=deps,
        group_name=recipe.name,
        op_tags={RECIPE: recipe.name},
        description=f"This recipe cannot be used:\n\n```\n{recipe.error}\n```",
    )
    def broken() -> None:
        with user_errors():
            raise recipe.error

    return broken
