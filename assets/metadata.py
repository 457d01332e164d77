"""`<recipe>/metadata`: reads the data set's table and checks every row and file."""

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
    from diffsynth_dagster.cache.long_captions import LongCaptions
    from diffsynth_dagster.data.table.validate import CheckedTable

CHECK = "every_row_valid"
_SHOWN_ROWS = 20
_SHOWN_PICTURES = 48


def make_metadata(recipe: Recipe, upstream: list[dg.AssetKey]) -> dg.AssetsDefinition:
    """The metadata asset of a recipe, with its check.

    Args:
        upstream: the recipe's data asset, and assets of other recipes that write its tables.
    """
    key = asset_key(recipe.name, "metadata")

    @dg.asset(
        key=key,
        deps=upstream,
        group_name=recipe.name,
        kinds={"polars"},
        description=description(recipe, "The data set's table with every row checked."),
        code_version=code_version(recipe.config, "metadata"),
        # Metadata and weights do not depend on each other. A high priority runs the metadata first,
        # so that a bad table fails before the download of the weights.
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
        result = _check_rows(context, recipe, diffsynth_parameters)
        yield result
        require_passed(result)

    return metadata


def _check_rows(
    context: dg.AssetExecutionContext, recipe: Recipe, parameters: Parameters
) -> dg.MaterializeResult:
    """The work of the step: make the data set if the recipe says how, check and describe its rows."""
    from diffsynth_dagster.cache.split import with_settled
    from diffsynth_dagster.data.prepare import make_data, require_named
    from diffsynth_dagster.training.overlap import refuse_overlap, refuse_own_recipe

    with user_errors():
        ran = launched(context, recipe, parameters)
        config = with_settled(ran.config)
        refuse_overlap(config)
        refuse_own_recipe(config, recipe.path)
        require_named(config)
        if config.dataset_metadata_path is not None:  # before the look at its files
            make_data(config)
        seen = look(context, "metadata", ran)
        same = seen.unchanged()
    if same is not None:
        return same
    with user_errors():
        checked, held_out, long_captions = _read_tables(config)
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
            **_held_out_counts(held_out),
            **ran.facts,
        }
        version = _version(checked, held_out)
        check = _check(config, checked, held_out, warnings)
    return dg.MaterializeResult(
        metadata=facts,
        data_version=version,
        tags=seen.marked if check.passed else seen.tags,
        check_results=[check],
    )


def _read_tables(
    config: TrainingConfig,
) -> "tuple[CheckedTable, CheckedTable | None, LongCaptions | None]":
    """The checked table, the held-out one if there is one, and which captions are too long."""
    # Only here: these import torch, which takes seconds.
    from diffsynth_dagster.cache.held_out import held_out_config
    from diffsynth_dagster.cache.long_captions import count_if_there
    from diffsynth_dagster.data.prepare import prepare_data
    from diffsynth_dagster.facts import fact_cache_of
    from diffsynth_dagster.training.overlap import refuse_replaced_rows
    from diffsynth_dagster.weights.identify import guess_model

    columns = guess_model(config).family.columns
    holdout = held_out_config(config)
    with fact_cache_of(config.cache_path) as fact_cache:
        signed = config.holds_out
        checked = prepare_data(config, columns, fact_cache, made=True, signed=signed)
        held_out = (
            None if holdout is None else prepare_data(holdout, columns, fact_cache, signed=True)
        )
        long_captions = count_if_there(config, checked, fact_cache)
    refuse_replaced_rows(config, [checked] if held_out is None else [checked, held_out])
    return checked, held_out, long_captions


def _version(checked: "CheckedTable", held_out: "CheckedTable | None") -> dg.DataVersion:
    """Digest of the content of all rows, with those of the held-out table if there is one."""
    from diffsynth_dagster.data.digests import digest_rows
    from diffsynth_dagster.facts import digest_of

    tables = [checked] if held_out is None else [checked, held_out]
    digests = [digest_rows(table.rows.select(contents_of(table))) for table in tables]
    return dg.DataVersion(digests[0] if held_out is None else digest_of(digests))


def _held_out_counts(held_out: "CheckedTable | None") -> dict[str, int]:
    """How many rows of the held-out table have each status."""
    counts = {} if held_out is None else held_out.counts
    return {f"held_out/{status}": count for status, count in counts.items()}


def contents_of(checked: "CheckedTable") -> list[str]:
    """The columns that make up the content of the rows: not where their files are, nor how old."""
    import polars as pl

    schema = checked.rows.collect_schema()
    # These two columns came later. They count only where they hold a value, so that tables without
    # one keep the data version that they had before.
    optional = [c for c in schema if c.endswith((":shown", ":reading"))]
    listed = [c for c in optional if schema[c] == pl.List]
    filled = [pl.col(c).list.drop_nulls().list.len().sum() > 0 for c in listed]
    filled += [pl.col(c).is_not_null().any() for c in optional if c not in listed]
    has_values: dict[str, bool] = {}
    if filled:
        has_values = checked.rows.select(filled).collect(engine="streaming").row(0, named=True)
    places = (":path", ":size", ":modified", ":transparent", ":signature")
    return [c for c in schema if not c.endswith(places) and has_values.get(c, True)]


def _check(
    config: TrainingConfig,
    checked: "CheckedTable",
    held_out: "CheckedTable | None",
    warnings: list[str],
) -> dg.AssetCheckResult:
    """The result of the check. It passes if both tables have few enough rejected rows.

    Args:
        warnings: the warnings about `checked`, with those that need more than the table.
    """
    tables = [checked] if held_out is None else [checked, held_out]
    rows = sum(sum(table.counts.values()) for table in tables)
    accepted = sum(table.counts.get("ok", 0) for table in tables)
    allowed = config.max_rejected_fraction
    return dg.AssetCheckResult(
        check_name=CHECK,
        passed=all(table.is_accepted(allowed) for table in tables),
        description="\n".join(
            _verdict(table, allowed, warnings if table is checked else table.warnings())
            for table in tables
        ),
        metadata={"rejected_rows": rows - accepted, "rows": rows},
    )


def _verdict(checked: "CheckedTable", allowed: float, warnings: list[str]) -> str:
    """The check's text for one table: counts, then warnings or the first rejected rows."""
    from diffsynth_dagster.data.table.validate import MEND_ROWS
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
    """The files of the contact sheet, rejected rows first."""
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
    # From the counts, since counting the rows of a lazy table would read it once more.
    more = sum(counts.values()) - rows.height
    return markdown(columns, rows.iter_rows()) + (f"\n\nand {more} more" if more > 0 else "")
