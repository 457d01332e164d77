"""Assets of a recipe that cannot be used: they stand where its assets would, and say why."""

import dagster as dg

from assets.common import asset_key, user_errors
from resources import BrokenRecipe

_KINDS = ("metadata", "latents", "checkpoints", "exports")


def make_broken(recipe: BrokenRecipe) -> list[dg.AssetsDefinition]:
    """The assets of a broken recipe: each fails with the recipe's mistake."""
    assets: list[dg.AssetsDefinition] = []
    for before, kind in zip((None, *_KINDS), _KINDS, strict=False):
        deps = [asset_key(before, recipe.name)] if before else []
        assets.append(_make(recipe, kind, deps))
    return assets


def _make(recipe: BrokenRecipe, kind: str, deps: list[dg.AssetKey]) -> dg.AssetsDefinition:
    @dg.asset(
        key=asset_key(kind, recipe.name),
        deps=deps,
        group_name=recipe.name,
        description=f"This recipe cannot be used:\n\n```\n{recipe.error}\n```",
    )
    def broken() -> None:
        with user_errors():
            raise recipe.error

    return broken
