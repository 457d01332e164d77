"""`<recipe>/latents`: the encoded samples, in the store."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import dagster as dg

from assets.common import GPU_POOL, asset_key, code_version, description, table, user_errors
from diffsynth_dagster.config import Recipe
from resources import Launcher, Parameters

if TYPE_CHECKING:
    from diffsynth_dagster.cache.contents import Contents
    from diffsynth_dagster.cache.manifest import Manifest

CHECK = "latents_complete_and_finite"


def make_latents(recipe: Recipe, weights: list[dg.AssetKey]) -> dg.AssetsDefinition:
    """The latents asset of a recipe, with its check."""
    key = asset_key(recipe.name, "latents")

    @dg.asset(
        key=key,
        deps=[asset_key(recipe.name, "metadata"), *weights],
        group_name=recipe.name,
        kinds={"pytorch", "safetensors"},
        description=description(recipe, "The samples encoded once, so that training reads them."),
        code_version=code_version(recipe.config, "latents"),
        pool=GPU_POOL,
        check_specs=[
            dg.AssetCheckSpec(
                CHECK,
                asset=key,
                blocking=True,
                description="The store holds every input of the training, without NaN or infinity.",
            )
        ],
    )
    def latents(
        context: dg.AssetExecutionContext, parameters: Parameters, launcher: Launcher
    ) -> Iterator[dg.MaterializeResult]:
        from diffsynth_dagster.cache.contents import look_into
        from diffsynth_dagster.cache.manifest import read_manifest
        from diffsynth_dagster.cache.split import first_half
        from diffsynth_dagster.data.table.checked import read_checked

        report: dict[str, Any] = {}
        with user_errors():
            config = first_half(parameters.apply(recipe.config))
            checked = read_checked(Path(config.output_path))
            for message in launcher.run(context, config, recipe.options):
                if message["event"] == "encoding":
                    stage, done, total = (message[name] for name in ("stage", "done", "total"))
                    context.log.info(f"{stage}: {done} of {total} encoded")
                elif message["event"] == "encoded":
                    report = message
            manifest = read_manifest(Path(config.output_path))
            facts, check = _describe(manifest, look_into(manifest, checked))
        for kind in ("hits", "misses"):
            counts: dict[str, int] = report.get(kind, {})
            facts |= {f"{kind}/{stage}": count for stage, count in counts.items()}
            context.log.info(f"{kind}: {counts}")
        yield dg.MaterializeResult(
            metadata=facts,
            data_version=dg.DataVersion(manifest.digest),
            check_results=[check],
        )

    return latents


def _describe(
    manifest: "Manifest", contents: "Contents"
) -> tuple[dict[str, Any], dg.AssetCheckResult]:
    """What the store holds for a manifest, and whether that is all and sound."""
    facts: dict[str, Any] = {
        "dagster/row_count": contents.samples,
        "store_bytes": contents.bytes,
        "store": dg.MetadataValue.path(manifest.store),
        "buckets": table(
            {"width": width, "height": height, "samples": count}
            for width, height, count in contents.buckets
        ),
    }
    return facts, dg.AssetCheckResult(
        check_name=CHECK,
        passed=contents.sound,
        description=f"{contents.missing} keys are missing, {contents.not_finite} hold NaN or "
        f"infinity; {contents.samples} samples for {contents.accepted} accepted rows",
        metadata={
            "missing_keys": contents.missing,
            "keys_not_finite": contents.not_finite,
            "samples": contents.samples,
            "accepted_rows": contents.accepted,
        },
    )
