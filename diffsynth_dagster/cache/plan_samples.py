"""Make the manifest of a checked table: compute the keys of all samples before any is encoded.

The table is read and the manifest is written in batches; only one integer per row stays in memory.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import polars as pl

from diffsynth_dagster.cache.captions import Captions, captions_of
from diffsynth_dagster.cache.keys import (
    CONTENT,
    READ_AS,
    Keys,
    content_number,
    sample_identity,
    signature,
    stage_digest,
    with_contents,
)
from diffsynth_dagster.cache.layout import LAYOUT_VERSION
from diffsynth_dagster.cache.manifest import (
    CONTENT_NUMBER,
    PLANNED,
    SIGNATURE,
    Manifest,
    Notes,
    write_manifest,
)
from diffsynth_dagster.config.affects import settled_by_encoding
from diffsynth_dagster.config.parameters import TrainingConfig
from diffsynth_dagster.data.columns import Columns, Input
from diffsynth_dagster.data.digests import digest_rows
from diffsynth_dagster.data.samples import PARTS, files_as_json
from diffsynth_dagster.data.scan import scan_parquet
from diffsynth_dagster.data.table.rows import REPEAT
from diffsynth_dagster.data.table.validate import CheckedTable
from diffsynth_dagster.families.contract import Stage
from diffsynth_dagster.files import hidden_folder, write_whole
from diffsynth_dagster.weights.resolved import ResolvedModel

_NUMBER = "\x00number"
"""A column with the number of the row, while its captions have rows of their own."""
_AT_ONCE = 1 << 14
"""Rows whose captions are processed together: each caption is a row meanwhile."""
_SIZES = {"row": pl.UInt32, "width": pl.Int64, "height": pl.Int64, "frames": pl.Int64}


def plan_samples(
    config: TrainingConfig,
    model: ResolvedModel,
    table: CheckedTable,
    keys: Keys,
    made_of: Mapping[str, Any] | None = None,
) -> Manifest:
    """Write the planned manifest of a checked table into the run folder. Nothing is encoded yet.

    Args:
        made_of: see `Notes`.

    Raises:
        WeightsError: a component that a cached stage uses is missing.
        OutputError: the run folder cannot be written.
    """
    family = model.family
    cached = model.cached_stages
    step_inputs = list(dict.fromkeys(i for stage in model.step_stages for i in stage.reads))
    captions = captions_of(config, family)
    output = Path(config.output_path)
    # A draft goes to disk first: identities must all be known to number the equal ones.
    with hidden_folder(output / "plan") as folder:
        draft = folder / "draft.parquet"
        sizes = _sizes(table)
        make_rows = _row_maker(family.columns, cached, step_inputs, keys, captions, sizes)
        signed = signature(family.columns.inputs, table.rows.collect_schema().names())
        read = [*_read_columns(family.columns, sizes), signed.alias(SIGNATURE)]
        planned = table.accepted.select(read).map_batches(
            make_rows,
            schema=_schema(cached, step_inputs, captions, sizes),
            streamable=True,
            # Polars cannot see that `make_rows` returns other columns than it is given.
            predicate_pushdown=False,
            projection_pushdown=False,
        )
        write_whole(draft, lambda staged: planned.sink_parquet(staged, compression="lz4"))
        rows = _with_occurrence(scan_parquet(draft))
        # Not the inputs of the step: their text may contain paths, which say nothing of content.
        identity = [*sizes, "shape", "sample", *(f"key:{s.name}" for s in cached)]
        notes = Notes(
            store=str(Path(config.cache_path).absolute()),
            family=family.name,
            digest=digest_rows(rows.select(identity)),
            samples=int(rows.select(pl.len()).collect().item()),
            outputs={s.name: s.yields[0].name for s in cached},
            weights=keys.weights(cached),
            parameters=settled_by_encoding(config),
            data=table.data,
            stages={s.name: stage_digest(s) for s in cached},
            layout=LAYOUT_VERSION,
            made_of=dict(made_of or {}),
        )
        return write_manifest(rows, notes, output / PLANNED)


def _sizes(table: CheckedTable) -> dict[str, Any]:
    """The numeric columns that a manifest takes over from a checked table, with their types."""
    names = table.rows.collect_schema().names()
    return {**_SIZES, **({REPEAT: pl.UInt32} if REPEAT in names else {})}


def _read_columns(columns: Columns, sizes: Mapping[str, Any]) -> list[str]:
    """The columns of a checked table that a manifest is made from."""
    # Everything about the files: the step may read some of them itself.
    parts = [f"{item.column}:{part}" for item in columns.files for part in PARTS]
    return [*sizes, "shape", *(item.column for item in columns.inputs), *parts]


def _schema(
    cached: Sequence[Stage],
    step_inputs: Sequence[Input],
    captions: Captions | None,
    sizes: Mapping[str, Any],
) -> dict[str, Any]:
    """The columns of a manifest with their types, in order."""
    texts = [
        "shape",
        *(f"key:{s.name}" for s in cached),
        *(f"input:{i.column}" for i in step_inputs),
    ]
    listed = dict.fromkeys(_listed(cached, step_inputs, captions), pl.List(pl.String))
    plain = dict.fromkeys(texts, pl.String)
    first = {"sample": pl.String, CONTENT_NUMBER: pl.UInt64, SIGNATURE: pl.String}
    # `listed` replaces the types of columns in `plain`; their place stays.
    return {**first, **sizes, "tokens": pl.Int64, **plain, **listed}


def _listed(
    cached: Sequence[Stage], step_inputs: Sequence[Input], captions: Captions | None
) -> list[str]:
    """The columns of a manifest that hold a list of one text for each caption."""
    if captions is None:
        return []
    keys = [f"key:{stage.name}" for stage in cached if captions.told(stage)]
    return keys + [f"input:{i.column}" for i in step_inputs if i.column == captions.column]


def _row_maker(
    columns: Columns,
    cached: Sequence[Stage],
    step_inputs: Sequence[Input],
    keys: Keys,
    captions: Captions | None,
    sizes: Mapping[str, Any],
) -> Any:
    """A function that makes rows of a manifest from rows of a checked table."""
    identity = sample_identity(columns.inputs).alias("sample")
    others = [
        content_number(columns.inputs).alias(CONTENT_NUMBER),
        pl.col(SIGNATURE),
        *(pl.col(name).cast(kind) for name, kind in sizes.items()),
        tokens(columns).alias("tokens"),
        pl.col("shape"),
        *(keys.of_rows(stage).alias(f"key:{stage.name}") for stage in cached),
        *(
            (files_as_json(i) if i.is_file else pl.col(i.column)).alias(f"input:{i.column}")
            for i in step_inputs
        ),
    ]
    names = [*_schema(cached, step_inputs, captions, sizes)]
    listed = _listed(cached, step_inputs, captions)

    def make(rows: pl.DataFrame) -> pl.DataFrame:
        return with_contents(rows, columns.inputs).select(identity, *others)

    def make_with_captions(rows: pl.DataFrame) -> pl.DataFrame:
        assert captions is not None
        # Give each caption a row of its own, compute its keys, and gather them as lists again.
        texts = captions.of_rows(rows, captions.column)
        exploded = rows.with_row_index(_NUMBER).with_columns(texts).explode(captions.column)
        contents = [pl.col(CONTENT + i.column) for i in columns.inputs]
        read = pl.col("^" + READ_AS + ".*$")
        exploded = with_contents(exploded, columns.inputs).select(_NUMBER, *contents, read, *others)
        # The identity of a sample includes all its captions, except for the empty one: caption
        # dropout does not change the noise.
        caption_digests = pl.col(CONTENT + captions.column)
        if captions.empty:
            caption_digests = caption_digests.head(pl.len() - 1)
        gathered = exploded.group_by(_NUMBER, maintain_order=True).agg(
            caption_digests.str.join(",").alias(CONTENT + captions.column),
            pl.col(listed),
            pl.exclude(_NUMBER, CONTENT + captions.column, *listed).first(),
        )
        return gathered.with_columns(identity).select(names)

    def make_in_parts(rows: pl.DataFrame) -> pl.DataFrame:
        parts = [make_with_captions(part) for part in rows.iter_slices(_AT_ONCE)]
        return pl.concat(parts) if parts else make_with_captions(rows)

    return make if captions is None else make_in_parts


def tokens(columns: Columns) -> pl.Expr:
    """Number of patches of the latents of a row's files, in total: a measure of a step's cost.

    A patch covers `side_factor` x `side_factor` pixels; in a clip it also covers as many frames as
    the `step` of the frame rule.
    """
    geometry = columns.geometry
    step = geometry.frames.step if geometry.frames is not None else 1

    def patches(target: pl.Expr, frames: pl.Expr) -> pl.Expr:
        area = (target.list.get(0) // geometry.side_factor) * (
            target.list.get(1) // geometry.side_factor
        )
        return area * ((frames + step - 1) // step)

    total: pl.Expr = pl.lit(0, pl.Int64)
    # Masks that weigh the loss are no input of the model, and sound has few tokens.
    for item in (i for i in columns.files if i.kind != "audio" and not i.weighs):
        target, frames = pl.col(f"{item.column}:target"), pl.col(f"{item.column}:frames")
        if item.many:
            # A column that takes many files holds pictures, of one frame each.
            total += target.list.eval(patches(pl.element(), pl.lit(1))).list.sum()
        else:
            total += patches(target, frames)
    return total


def _with_occurrence(rows: pl.LazyFrame) -> pl.LazyFrame:
    """Make `sample` unique: `<identity>-<n>` for the n-th row with this identity.

    Equal rows are different samples of the data set, each with noise of its own.
    """
    # Compare the first 64 bits as integers, a quarter of the memory of the texts, and the whole
    # identity only of rows in which these are equal.
    start = pl.col("sample").str.slice(0, 16).str.to_integer(base=16, dtype=pl.UInt64)
    suspects = rows.select(start).collect(engine="streaming").to_series().is_duplicated()
    occurrence = pl.Series("n", [1], dtype=pl.UInt32).new_from_index(0, len(suspects))
    if suspects.any():
        equal = rows.select("sample").collect(engine="streaming").filter(suspects)
        number = equal.select(pl.int_range(1, pl.len() + 1).over("sample").cast(pl.UInt32))
        occurrence = occurrence.scatter(suspects.arg_true(), number.to_series())
    numbered = pl.concat([rows, occurrence.to_frame().lazy()], how="horizontal")
    return numbered.with_columns(pl.format("{}-{}", "sample", "n").alias("sample")).drop("n")
