"""`<recipe>/latents`: encodes the samples into the store."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import dagster as dg

from assets.common import (
    asset_key,
    code_version,
    description,
    require_passed,
    table,
    tried_again,
    user_errors,
)
from assets.launched import launched, step_tags
from assets.rows import long_captions_facts
from assets.unchanged import look
from diffsynth_dagster.config import Recipe, TrainingConfig
from diffsynth_dagster.run.events import Encoded, Encoding
from resources import Launcher, Parameters, pool_of

if TYPE_CHECKING:
    from diffsynth_dagster.cache.contents import Contents
    from diffsynth_dagster.cache.manifest import Manifest

CHECK = "latents_complete_and_finite"


def make_latents(recipe: Recipe, upstream: list[dg.AssetKey]) -> dg.AssetsDefinition:
    """The latents asset of a recipe, with its check.

    Args:
        upstream: the weights, and assets of other recipes whose files are used to encode.
    """
    key = asset_key(recipe.name, "latents")

    @dg.asset(
        key=key,
        deps=[asset_key(recipe.name, "metadata"), *upstream],
        group_name=recipe.name,
        kinds={"pytorch", "safetensors"},
        description=description(recipe, "The samples encoded once, so that training reads them."),
        code_version=code_version(recipe.config, "latents"),
        pool=pool_of(recipe.options),
        op_tags=step_tags(recipe),
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
        context: dg.AssetExecutionContext,
        diffsynth_parameters: Parameters,
        diffsynth_launcher: Launcher,
    ) -> Iterator[dg.MaterializeResult]:
        result = _encode(context, recipe, diffsynth_parameters, diffsynth_launcher)
        yield result
        require_passed(result)

    return latents


def _encode(
    context: dg.AssetExecutionContext, recipe: Recipe, parameters: Parameters, launcher: Launcher
) -> dg.MaterializeResult:
    """The work of the step: encode what the store lacks, then describe what it holds."""
    with user_errors():
        ran = launched(context, recipe, parameters, launcher)
        seen = look(context, "latents", ran)
        same = seen.unchanged()
    if same is not None:
        return same
    from diffsynth_dagster.cache.contents import look_into
    from diffsynth_dagster.cache.held_out import held_out_config
    from diffsynth_dagster.cache.layout import SAMPLES_FOLDER
    from diffsynth_dagster.cache.long_captions import read_long_captions
    from diffsynth_dagster.cache.manifest import read_manifest
    from diffsynth_dagster.cache.split import first_half
    from diffsynth_dagster.data.table.checked_table import PINNED, read_checked
    from diffsynth_dagster.facts import digest_of

    with tried_again(context, recipe.options.retries), user_errors():
        config = first_half(ran.config)
        checked = read_checked(Path(config.output_path))
        report = _launch(context, recipe, config, launcher)
        manifest = read_manifest(Path(config.output_path))
        contents, of_samples = [look_into(manifest, checked)], list["Contents"]()
        versions, holdout = [manifest.digest], held_out_config(config)
        # A held-out table has its own manifest, in a folder inside the run folder.
        if holdout is not None:
            folder = Path(holdout.output_path)
            held_out = read_manifest(folder)
            contents.append(look_into(held_out, read_checked(folder)))
            versions.append(held_out.digest)
        if config.makes_samples:
            folder = Path(config.output_path) / SAMPLES_FOLDER
            samples = read_manifest(folder)
            of_samples.append(look_into(samples, read_checked(folder, PINNED)))
            # Prompts are in the code version, but what a table holds is not.
            versions += [] if config.sample_table is None else [samples.digest]
        facts, check = _describe(manifest, contents, of_samples)
        facts |= long_captions_facts(read_long_captions(Path(config.output_path)))
    # Hits were in the store already, misses were encoded in this run.
    for kind, counts in (("hits", report.hits), ("misses", report.misses)):
        facts |= {f"{kind}/{stage}": count for stage, count in counts.items()}
        context.log.info(f"{kind}: {counts}")
    return dg.MaterializeResult(
        metadata={**facts, **ran.facts},
        data_version=dg.DataVersion(versions[0] if len(versions) == 1 else digest_of(versions)),
        # Without the mark, the next run does the work again instead of repeating this result.
        tags=seen.marked if check.passed else seen.tags,
        check_results=[check],
    )


def _launch(
    context: dg.AssetExecutionContext, recipe: Recipe, config: TrainingConfig, launcher: Launcher
) -> Encoded:
    """Run the encoding processes to their end, and log their progress; returns what they encoded."""
    report = Encoded({}, {})
    with user_errors(config):
        for event in launcher.run(context, config, recipe.options):
            match event:
                case Encoding(stage, done, total):
                    context.log.info(f"{stage}: {done} of {total} encoded")
                case Encoded():
                    report = event
                case _:
                    pass
    return report


def _describe(
    manifest: "Manifest", contents: "list[Contents]", of_samples: "Sequence[Contents]" = ()
) -> tuple[dict[str, Any], dg.AssetCheckResult]:
    """Metadata on what the store holds, and the result of the check that it is complete and finite.

    Args:
        manifest: of the samples that are trained on.
        contents: what the store holds for `manifest`, then for the held-out table if there is one.
        of_samples: what it holds for the rows that samples are made from.
    """
    whole = [*contents, *of_samples]
    missing, not_finite = (
        sum(getattr(c, name) for c in whole) for name in ("missing", "not_finite")
    )
    samples, accepted = (
        sum(getattr(c, name) for c in contents) for name in ("samples", "accepted")
    )
    facts: dict[str, Any] = {
        "dagster/row_count": contents[0].samples,
        "store_bytes": sum(content.bytes for content in whole),
        "store": dg.MetadataValue.path(manifest.store),
        "buckets": table(
            {"width": width, "height": height, "samples": count}
            for width, height, count in contents[0].buckets
        ),
    }
    return facts, dg.AssetCheckResult(
        check_name=CHECK,
        passed=all(content.sound for content in whole),
        description=f"{missing} keys are missing, {not_finite} hold NaN or "
        f"infinity; {samples} samples for {accepted} accepted rows",
        metadata={
            "missing_keys": missing,
            "keys_not_finite": not_finite,
            "samples": samples,
            "accepted_rows": accepted,
        },
    )
