"""`<recipe>/metadata`: the data set's table, every row of it checked."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import dagster as dg

from assets.common import (
    asset_key,
    code_version,
    description,
    require_passed,
    user_errors,
)
from assets.launched import launched, step_tags
from assets.pictures import Shown, contact_sheet, inline
from assets.rows import files_of_rows, long_captions_facts, markdown
from assets.unchanged import look
from diffsynth_dagster.config import Recipe, TrainingConfig
from resources import Parameters

if TYPE_CHECKING:
    from diffsynth_dagster.data.table.check import CheckedTable

CHECK = "every_row_valid"
_SHOWN_ROWS = 20
_SHOWN_PICTURES = 48


def make_metadata(recipe: Recipe, upstream: list[dg.AssetKey]) -> dg.AssetsDefinition:
    """The metadata asset of a recipe, with its check.

    Args:
        upstream: the assets that its tables come from.
    """
    key = asset_key(recipe.name, "metadata")

    @dg.asset(
        key=key,
        deps=upstream,
        group_name=recipe.name,
        kinds={"polars"},
        description=description(recipe, "The data set's table with every row checked."),
        code_version=code_version(recipe.config, "metadata"),
        # Before the weights, which nothing orders otherwise: a bad table costs no download.
        op_tags={**step_tags(recipe), "dagster/priority": "10"},
        check_specs=[
            dg.AssetCheckSpec(
                CHECK,
                asset=key,
                blocking=True,
                description="No more rows are unusable than `max_rejected_fraction` allows.",
            )
        ],
    )
    def metadata(
        context: dg.AssetExecutionContext, diffsynth_parameters: Parameters
    ) -> Iterator[dg.MaterializeResult]:
        from diffsynth_dagster.cache.held_out import held_out_config
        from diffsynth_dagster.cache.split import with_settled
        from diffsynth_dagster.data.prepare import make_data, prepare_data, require_named
        from diffsynth_dagster.facts import fact_cache_of
        from diffsynth_dagster.training.overlap import (
            refuse_overlap,
            refuse_own_recipe,
            refuse_replaced_rows,
        )

        with user_errors():
            ran = launched(context, recipe, diffsynth_parameters)
            config = with_settled(ran.config)
            refuse_overlap(config)
            refuse_own_recipe(config, recipe.path)
            require_named(config)
            if config.dataset_metadata_path is not None:
                make_data(config)
            seen = look(context, "metadata", ran)
            same = seen.unchanged()
        if same is not None:
            yield same
            return
        # These import torch.
        from diffsynth_dagster.cache.long_captions import count_if_there
        from diffsynth_dagster.weights.identify import guess_model

        with user_errors():
            columns = guess_model(config).family.columns
            own = held_out_config(config)
            with fact_cache_of(config.cache_path) as fact_cache:
                checked = prepare_data(config, columns, fact_cache, made=True)
                held_out = None if own is None else prepare_data(own, columns, fact_cache)
                long_captions = count_if_there(config, checked, fact_cache)
            refuse_replaced_rows(config, [checked] if held_out is None else [checked, held_out])
            counts = checked.counts
            context.log.info(f"rows by status: {counts}")
            warnings = checked.warnings()
            if long_captions is not None and long_captions.warning is not None:
                warnings.append(long_captions.warning)
            for warning in warnings:
                context.log.warning(warning)
            facts = {
                **_describe(config, checked, counts),
                **long_captions_facts(long_captions),
                **_held_out(held_out),
                **ran.facts,
            }
            version = _version(checked, held_out)
            check = _check(config, checked, held_out, warnings)
        yield dg.MaterializeResult(
            metadata=facts,
            data_version=version,
            tags=seen.marked if check.passed else seen.tags,
            check_results=[check],
        )
        require_passed(check)

    return metadata


def _version(checked: "CheckedTable", held_out: "CheckedTable | None") -> dg.DataVersion:
    """What the rows are, and those that are held out as a table of their own."""
    from diffsynth_dagster.data.digests import digest_rows
    from diffsynth_dagster.facts import digest_of

    tables = [checked] if held_out is None else [checked, held_out]
    digests = [digest_rows(each.rows.select(contents_of(each))) for each in tables]
    return dg.DataVersion(digests[0] if held_out is None else digest_of(digests))


def _held_out(held_out: "CheckedTable | None") -> dict[str, int]:
    """How many rows of a held-out table are of each status."""
    counts = {} if held_out is None else held_out.counts
    return {f"held_out/{status}": count for status, count in counts.items()}


def contents_of(checked: "CheckedTable") -> list[str]:
    """The columns that say what the rows are, wherever and since when their files lie."""
    import polars as pl

    schema = checked.rows.collect_schema()
    # Where no file of a column is read in a way of its own, the rows are what they always were.
    told = [c for c in schema if c.endswith((":shown", ":reading"))]
    listed = [c for c in told if schema[c] == pl.List]
    some = [pl.col(c).list.drop_nulls().list.len().sum() > 0 for c in listed]
    some += [pl.col(c).is_not_null().any() for c in told if c not in listed]
    found = checked.rows.select(some).collect(engine="streaming").row(0, named=True) if some else {}
    places = (":path", ":size", ":modified", ":transparent")
    return [c for c in schema if not c.endswith(places) and found.get(c, True)]


def _check(
    config: TrainingConfig,
    checked: "CheckedTable",
    held_out: "CheckedTable | None",
    warnings: list[str],
) -> dg.AssetCheckResult:
    """The result of the check.

    Args:
        warnings: of the table that is trained on.
    """
    tables = [checked] if held_out is None else [checked, held_out]
    rows = sum(sum(each.counts.values()) for each in tables)
    accepted = sum(each.counts.get("ok", 0) for each in tables)
    allowed = config.max_rejected_fraction
    return dg.AssetCheckResult(
        check_name=CHECK,
        passed=all(each.is_accepted(allowed) for each in tables),
        description="\n".join(
            _verdict(each, allowed, warnings if each is checked else each.warnings())
            for each in tables
        ),
        metadata={"rejected_rows": rows - accepted, "rows": rows},
    )


def _verdict(checked: "CheckedTable", allowed: float, warnings: list[str]) -> str:
    """What was found in a table, in numbers; if it is refused, with its first rejected rows."""
    from diffsynth_dagster.data.table.check import MEND_ROWS
    from diffsynth_dagster.errors import printable

    summary = checked.summary(allowed)
    if checked.is_accepted(allowed):
        return "\n".join([summary, *(f"warning: {text}" for text in warnings)])
    lines = [summary, *checked.first_rejected(), f"where: {printable(checked.source)}"]
    return "\n  ".join([*lines, f"what to do: {MEND_ROWS}"])


def _describe(
    config: TrainingConfig, checked: "CheckedTable", counts: dict[str, int]
) -> dict[str, dg.MetadataValue | int]:
    found: dict[str, dg.MetadataValue | int] = {
        "dagster/row_count": sum(counts.values()),
        "duplicates": checked.duplicates(),
        "rows": dg.MetadataValue.md(_markdown(checked, counts)),
        "table": dg.MetadataValue.path(
            str(Path(config.output_path).absolute() / "metadata.parquet")
        ),
        **{f"status/{status}": count for status, count in counts.items()},
    }
    sheet = contact_sheet(_files(checked))
    if sheet is not None:
        found["contact_sheet"] = inline(sheet)
    return found


def _files(checked: "CheckedTable") -> list[Shown]:
    """Files to show, those of rejected rows first: images, and a strip of frames of each clip.

    A clip whose row is rejected may not be safe to decode and is left out.
    """
    files: list[Shown] = []
    for rows, accepted in ((checked.rejected, False), (checked.accepted, True)):
        files += files_of_rows(rows.head(_SHOWN_PICTURES).collect(), accepted)
    return files[:_SHOWN_PICTURES]


def _markdown(checked: "CheckedTable", counts: dict[str, int]) -> str:
    """The first rows as a table, rejected ones first."""
    import polars as pl

    hidden = ("width", "height", "frames", "shape")
    names = checked.rows.collect_schema().names()
    columns = [c for c in names if ":" not in c and c not in hidden]
    parts = [
        part.select(columns).head(_SHOWN_ROWS) for part in (checked.rejected, checked.accepted)
    ]
    rows = pl.concat(parts).head(_SHOWN_ROWS).collect()
    more = sum(counts.values()) - rows.height
    return markdown(columns, rows.iter_rows()) + (f"\n\nand {more} more" if more > 0 else "")
