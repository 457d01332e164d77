"""`latents/<recipe>`: the encoded samples, in the store."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import dagster as dg

from assets.common import GPU_POOL, asset_key, code_version, description, table, user_errors
from diffsynth_dagster.config import Recipe, TrainingConfig
from resources import Launcher, Parameters

if TYPE_CHECKING:
    from diffsynth_dagster.cache.manifest import Manifest

CHECK = "latents_complete_and_finite"
_DEPENDS_ON = (
    "bucket_step",
    "edit_plus",
    "extra_inputs",
    "family",
    "fp8_models",
    "frame_rate",
    "height",
    "lora_base_model",
    "max_pixels",
    "mixed_precision",
    "num_frames",
    "preset_lora_model",
    "preset_lora_path",
    "sample_cfg_scale",
    "sample_prompts",
    "task",
    "trainable_models",
    "width",
    "zero_cond_t",
)


def make_latents(recipe: Recipe, weights: list[dg.AssetKey]) -> dg.AssetsDefinition:
    """The latents asset of a recipe, with its check."""
    key = asset_key("latents", recipe.name)

    @dg.asset(
        key=key,
        deps=[asset_key("metadata", recipe.name), *weights],
        group_name=recipe.name,
        kinds={"pytorch", "safetensors"},
        description=description(recipe, "The samples encoded once, so that training reads them."),
        code_version=code_version(recipe.config, _DEPENDS_ON),
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
        from diffsynth_dagster.cache.manifest import read_manifest

        report: dict[str, Any] = {}
        with user_errors():
            config = parameters.apply(recipe.config)
            for message in launcher.run(context, config, recipe.options, "data_process"):
                if message["event"] == "encoding":
                    stage, done, total = (message[name] for name in ("stage", "done", "total"))
                    context.log.info(f"{stage}: {done} of {total} encoded")
                elif message["event"] == "encoded":
                    report = message
            manifest = read_manifest(Path(config.output_path))
            facts, check = _inspect(config, manifest)
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


def _inspect(
    config: TrainingConfig, manifest: "Manifest"
) -> tuple[dict[str, Any], dg.AssetCheckResult]:
    """What the store holds for a manifest, and whether that is all and sound."""
    import polars as pl

    from diffsynth_dagster.cache.store import Store

    index = Store(Path(manifest.store)).index()
    held = index.filter(pl.col("key").is_in(manifest.keys)).unique(["key", "output"])
    keys = set(held["key"])
    missing = [key for key in manifest.keys if key not in keys]
    broken = held.filter(~pl.col("finite"))["key"].unique().to_list()
    checked = pl.read_parquet(Path(config.output_path) / "metadata.parquet", columns=["status"])
    accepted = checked.filter(pl.col("status") == "ok").height
    rows = manifest.frame.height
    buckets = manifest.frame.group_by("width", "height").len("samples").sort("width", "height")
    facts: dict[str, Any] = {
        "dagster/row_count": rows,
        "store_bytes": int(held["bytes"].sum()),
        "store": dg.MetadataValue.path(manifest.store),
        "buckets": table(buckets.iter_rows(named=True)),
    }
    counts = {
        "missing_keys": len(missing),
        "keys_not_finite": len(broken),
        "samples": rows,
        "accepted_rows": accepted,
    }
    return facts, dg.AssetCheckResult(
        check_name=CHECK,
        passed=not missing and not broken and rows == accepted,
        description=f"{len(missing)} keys are missing, {len(broken)} hold NaN or infinity; "
        f"{rows} samples for {accepted} accepted rows",
        metadata=counts,
    )
