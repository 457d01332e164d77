"""Assets of a recipe that cannot be used: they have its keys, and fail with the reason."""

import dagster as dg

from assets.common import KINDS, Kind, asset_key, user_errors
from assets.launched import RECIPE
from resources import BrokenRecipe


def make_broken(recipe: BrokenRecipe) -> list[dg.AssetsDefinition]:
    """The assets of a broken recipe: each fails with the recipe's mistake."""
    assets: list[dg.AssetsDefinition] = []
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
