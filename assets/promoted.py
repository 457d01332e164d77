"""`<recipe>/promoted`: the export that others use. A new one takes its place unless it is worse."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import dagster as dg
from pydantic import Field

from assets.common import (
    asset_key,
    code_version,
    description,
    require_passed,
    table,
    user_errors,
)
from assets.launched import CODE_VERSION, launched, step_tags
from diffsynth_dagster.config import Recipe, TrainingConfig
from resources import Parameters

if TYPE_CHECKING:
    from diffsynth_dagster.export.judged import Verdict
    from diffsynth_dagster.export.promote import Outcome

CHECK = "not_worse"


class PromotedConfig(dg.Config):
    """Choices of one run."""

    version: str | None = Field(
        default=None,
        description="Roll back: make this version, which is kept, the current one. The beginning of its "
        "name is enough.",
    )
    force: bool = Field(
        default=False,
        description="Promote the export even if it is worse, or was rolled back from.",
    )


def make_promoted(recipe: Recipe) -> dg.AssetsDefinition:
    """The promoted asset of a recipe, with its check."""
    key = asset_key(recipe.name, "promoted")

    @dg.asset(
        key=key,
        deps=[asset_key(recipe.name, "exports")],
        group_name=recipe.name,
        kinds={"safetensors"},
        description=description(
            recipe,
            "The export that others use: the newest one that is not worse than the best before it.",
        ),
        code_version=_version(recipe, code_version(recipe.config, "promoted")),
        op_tags=step_tags(recipe),
        check_specs=[
            dg.AssetCheckSpec(
                CHECK,
                asset=key,
                blocking=True,
                description="The loss of the new export is not worse than the best of those promoted before.",
            )
        ],
    )
    def promoted(
        context: dg.AssetExecutionContext, config: PromotedConfig, diffsynth_parameters: Parameters
    ) -> Iterator[dg.MaterializeResult]:
        with user_errors():
            ran = launched(context, recipe, diffsynth_parameters)
            outcome = _promote(recipe, ran.config, config)
            check = _check(outcome, Path(ran.config.output_path), context.asset_key)
        text = f"{outcome.what}: {outcome.why}"
        if outcome.unfinished:
            context.log.warning(text)
        elif outcome.what == "kept":
            context.log.warning(f"{text}; {_to_promote(context.asset_key)}")
        else:
            context.log.info(text)
        tags = ran.tags("promoted")
        tags[CODE_VERSION] = _version(recipe, tags[CODE_VERSION])
        # Stale until the training is finished, like the exports: see there.
        if outcome.unfinished:
            tags = {CODE_VERSION: "unfinished"}
        result = dg.MaterializeResult(
            metadata={**_describe(outcome, Path(ran.config.output_path)), **ran.facts},
            # The current version: what is made from it becomes stale only when that changes.
            data_version=dg.DataVersion(outcome.current.version),
            tags=tags,
            check_results=[check],
        )
        yield result
        require_passed(result)

    return promoted


def _version(recipe: Recipe, version: str) -> str:
    """A code version with the margin: with another one a refused export may be promoted."""
    return f"{version} {recipe.options.promote_margin:g}"


def _promote(recipe: Recipe, config: TrainingConfig, asked: PromotedConfig) -> "Outcome":
    """Promote the export, or roll back to the version that is asked for. Raises `OutputError`."""
    from diffsynth_dagster.export.promote import promote, roll_back
    from diffsynth_dagster.facts import fact_cache_of

    folder, options = Path(config.output_path), recipe.options
    if asked.version is not None:
        return roll_back(folder, asked.version)
    with fact_cache_of(config.cache_path) as facts:
        return promote(
            folder, options.promote_margin, options.promote_keep, facts.digest, asked.force
        )


def _check(outcome: "Outcome", folder: Path, key: dg.AssetKey) -> dg.AssetCheckResult:
    """The result of the check: it fails if the new export was refused as worse."""
    from diffsynth_dagster.errors import OutputError

    text = f"{outcome.what}: {outcome.why}"
    if outcome.what == "refused":
        error = OutputError(
            f"the new export is not promoted: {outcome.why}",
            where=f"{folder.absolute()}; version {outcome.current.version} stays the current one",
            do=f"change the recipe, and train again; or, {_to_promote(key)}",
        )
        text = str(error)
    verdict = outcome.verdict
    return dg.AssetCheckResult(
        check_name=CHECK,
        passed=outcome.what != "refused",
        description=text,
        metadata={} if verdict is None else _compared(verdict),
    )


def _to_promote(key: dg.AssetKey) -> str:
    return (
        f"to promote it nevertheless, materialize {key.to_user_string()} with `force: true` in the run "
        "config"
    )


def _compared(verdict: "Verdict") -> dict[str, dg.MetadataValue]:
    return {
        "compared": dg.MetadataValue.text(verdict.number),
        "new": _number(verdict.new),
        "promoted_before": _number(verdict.old),
        "margin": _number(verdict.margin),
    }


def _describe(outcome: "Outcome", folder: Path) -> dict[str, dg.MetadataValue]:
    """Metadata: the current version, and what was done with the new export."""
    from diffsynth_dagster.promoted import CURRENT, promoted_versions

    current = outcome.current
    checkpoint = (folder / CURRENT / next(iter(current.checkpoints))).absolute()
    kept = reversed(promoted_versions(folder))  # the current one first
    return {
        "what_happened": dg.MetadataValue.text(outcome.what),
        "why": dg.MetadataValue.text(outcome.why),
        "version": dg.MetadataValue.text(current.version),
        "step": dg.MetadataValue.int(current.step),
        "folder": dg.MetadataValue.path(str((folder / CURRENT).absolute())),
        "checkpoint": dg.MetadataValue.path(str(checkpoint)),
        **{name: _number(number.value) for name, number in current.numbers.items()},
        "versions": table(
            {
                "version": version.version,
                "promoted": version.promoted,
                "rolled back": version.rolled_back or "",
                **{name: str(number.value) for name, number in version.numbers.items()},
            }
            for version in kept
        ),
    }


def _number(value: float) -> dg.MetadataValue:
    """A number as metadata that is plotted; NaN and infinity as text, which JSON cannot write."""
    if math.isfinite(value):
        return dg.MetadataValue.float(value)
    return dg.MetadataValue.text(str(value))
