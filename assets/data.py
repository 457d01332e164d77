"""`<recipe>/data`: which files the data set has, so that a change of them is seen."""

import dagster as dg

from assets.common import asset_key, short_digest, user_errors
from assets.launched import CODE_VERSION, launched, step_tags
from diffsynth_dagster.config import Recipe, TrainingConfig
from resources import Parameters


def data_key(recipe: Recipe) -> dg.AssetKey | None:
    """Key of a recipe's data; None where it has none, as it trains from encoded samples."""
    return None if recipe.config.dataset_metadata_path is None else asset_key(recipe.name, "data")


def make_data(recipe: Recipe) -> dg.AssetsDefinition:
    """The data asset of a recipe.

    It is made in a second or two, reads no file, and holds nothing but its data version. (No observable
    source: Dagster's automation conditions do not see an observation that found nothing new, so that
    nothing could wait for it.)
    """

    @dg.asset(
        key=asset_key(recipe.name, "data"),
        group_name=recipe.name,
        kinds={"file"},
        description="The files of the data set: names, sizes and modification times.",
        code_version=_version(recipe.config),
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
    """Stands for what is listed."""
    names = ("dataset_base_path", "dataset_metadata_path", "validation_metadata_path")
    return short_digest([1, *(getattr(config, name) for name in names)])
