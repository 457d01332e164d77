"""`<recipe>/metadata`: the data set's table, every row of it checked."""

from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import dagster as dg

from assets.common import asset_key, book_path, code_version, description, user_errors
from assets.pictures import Shown, contact_sheet, inline
from diffsynth_dagster.config import Recipe, TrainingConfig
from resources import Parameters

if TYPE_CHECKING:
    from diffsynth_dagster.data.table.check import Validated

CHECK = "every_row_valid"
_SHOWN_ROWS = 20
_SHOWN_PICTURES = 48
_STRIP = 4
"""Frames of a clip on the contact sheet."""
_SHOWN_CHARACTERS = 80


def make_metadata(recipe: Recipe) -> dg.AssetsDefinition:
    """The metadata asset of a recipe, with its check."""
    key = asset_key(recipe.name, "metadata")

    @dg.asset(
        key=key,
        group_name=recipe.name,
        kinds={"polars"},
        description=description(recipe, "The data set's table with every row checked."),
        code_version=code_version(recipe.config, "metadata"),
        # Before the weights, which nothing orders otherwise: a bad table costs no download.
        op_tags={"dagster/priority": "10"},
        check_specs=[
            dg.AssetCheckSpec(
                CHECK,
                asset=key,
                blocking=True,
                description="No more rows are unusable than `max_rejected_fraction` allows.",
            )
        ],
    )
    def metadata(context: dg.AssetExecutionContext, parameters: Parameters) -> dg.MaterializeResult:
        from diffsynth_dagster.data.prepare import prepare_data
        from diffsynth_dagster.facts import FactBook, digest_of
        from diffsynth_dagster.weights.identify import guess_family

        with user_errors():
            config = parameters.apply(recipe.config)
            columns = guess_family(config).columns
            with closing(FactBook(book_path(config))) as book:
                validated = prepare_data(config, columns, book)
        columns = [c for c in validated.frame.columns if not c.endswith(":path")]
        content = digest_of([columns, validated.frame.select(columns).rows()])
        context.log.info(f"rows by status: {validated.counts}")
        return dg.MaterializeResult(
            metadata=_describe(config, validated),
            data_version=dg.DataVersion(content),
            check_results=[_check(key, config, validated)],
        )

    return metadata


def _check(key: dg.AssetKey, config: TrainingConfig, validated: "Validated") -> dg.AssetCheckResult:
    from diffsynth_dagster.data.table.check import require_accepted
    from diffsynth_dagster.errors import MetadataError

    reason = "every row is usable, or few enough are not"
    try:
        require_accepted(validated, config.max_rejected_fraction)
        passed = True
    except MetadataError as error:
        passed, reason = False, str(error)
    rejected = validated.rejected.height
    return dg.AssetCheckResult(
        asset_key=key,
        check_name=CHECK,
        passed=passed,
        description=reason,
        metadata={"rejected_rows": rejected, "rows": validated.frame.height},
    )


def _describe(config: TrainingConfig, validated: "Validated") -> dict[str, dg.MetadataValue | int]:
    frame = validated.frame
    found: dict[str, dg.MetadataValue | int] = {
        "dagster/row_count": frame.height,
        "duplicates": validated.duplicates(),
        "rows": dg.MetadataValue.md(_markdown(validated)),
        "table": dg.MetadataValue.path(
            str(Path(config.output_path).absolute() / "metadata.parquet")
        ),
        **{f"status/{status}": count for status, count in validated.counts.items()},
    }
    sheet = contact_sheet(_files(validated))
    if sheet is not None:
        found["contact_sheet"] = inline(sheet)
    return found


def _files(validated: "Validated") -> list[Shown]:
    """Files to show, those of rejected rows first: images, and a strip of frames of each clip.

    A clip whose row is rejected may not be safe to decode and is left out.
    """
    files: list[Shown] = []
    columns = [c.removesuffix(":path") for c in validated.frame.columns if c.endswith(":path")]
    for rows, accepted in ((validated.rejected, False), (validated.accepted, True)):
        for row in rows.head(_SHOWN_PICTURES).iter_rows(named=True):
            for column in columns:
                parts = [_listed(row[f"{column}:{part}"]) for part in ("path", "frames", "stride")]
                for path, frames, stride in zip(*parts, strict=True):
                    is_clip = (frames or 1) > 1
                    if path is not None and (accepted or not is_clip):
                        shown = _frames(frames, stride) if is_clip else None
                        files.append(Shown(Path(path), accepted, shown))
    return files[:_SHOWN_PICTURES]


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _frames(count: int, stride: float) -> tuple[int, ...]:
    """The frames of a strip: the first, the last, and evenly between."""
    from diffsynth_dagster.data.geometry import frame_indices

    taken, shown = frame_indices(count, stride), min(count, _STRIP)
    return tuple(taken[round(i * (count - 1) / (shown - 1))] for i in range(shown))


def _markdown(validated: "Validated") -> str:
    """The first rows as a table, rejected ones first."""
    import polars as pl

    hidden = ("width", "height", "frames", "shape")
    columns = [c for c in validated.frame.columns if ":" not in c and c not in hidden]
    rows = pl.concat([validated.rejected, validated.accepted]).select(columns).head(_SHOWN_ROWS)
    lines = ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    lines += ["| " + " | ".join(_cell(value) for value in row) + " |" for row in rows.iter_rows()]
    more = validated.frame.height - rows.height
    return "\n".join(lines) + (f"\n\nand {more} more" if more > 0 else "")


def _cell(value: object) -> str:
    text = " ".join(str("" if value is None else value).split()).replace("|", "\\|")
    return text if len(text) <= _SHOWN_CHARACTERS else text[: _SHOWN_CHARACTERS - 1] + "…"
