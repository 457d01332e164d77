"""`<recipe>/data`: the listing of the data set's files, which detects that they have changed."""

import dagster as dg

from assets.common import asset_key, short_digest, user_errors
from assets.launched import CODE_VERSION, launched, step_tags
from diffsynth_dagster.config import Recipe, TrainingConfig
from resources import Parameters


def data_key(recipe: Recipe) -> dg.AssetKey | None:
    """Key of a recipe's data asset; None for a recipe that trains from encoded samples."""
    return None if recipe.config.dataset_metadata_path is None else asset_key(recipe.name, "data")


def make_data(recipe: Recipe) -> dg.AssetsDefinition:
    """The data asset of a recipe.

    It only lists the files, which takes a second or two, and its only result is its data version.
    """
    # Not an observable source asset: automation conditions do not see an observation that found
    # nothing new, so the metadata could not wait for it.

    @dg.asset(
        key=asset_key(recipe.name, "data"),
        group_name=recipe.name,
        kinds={"file"},
        description="The files of the data set: names, sizes and modification times.",
        code_version=_version(recipe.config),
        # A high priority: with a job of the whole recipe this runs before any download.
        op_tags={**step_tags(recipe), "dagster/priority": "10"},
    )
    def data(
        context: dg.AssetExecutionContext, diffsynth_parameters: Parameters
    ) -> dg.MaterializeResult:
        from diffsynth_dagster.data.listing import list_data

        with user_errors():
            ran = launched(context, recipe, diffsynth_parameters)
            listing = list_data(ran.config)
        return dg.MaterializeResult(
            metadata={"files": listing.files, "bytes": listing.bytes, **ran.facts},
            data_version=dg.DataVersion(listing.digest),
            tags={CODE_VERSION: _version(ran.config)},
        )

    return data


def _version(config: TrainingConfig) -> str:
    """The code version: the paths that are listed."""
    names = ("dataset_base_path", "dataset_metadata_path", "validation_metadata_path")
    # The 1 is the version of the listing itself: raise it when `list_data` lists something else.
    return short_digest([1, *(getattr(config, name) for name in names)])
