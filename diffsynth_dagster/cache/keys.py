"""Keys of encoded samples: digests of everything that a stage's outputs depend on.

A key is the BLAKE3 digest of a text, cut to 32 hexadecimal digits (128 bits). The text has two
parts. The first is the same for every row: the stage, the weights it uses, the element type. The
second is about the row: for each column that the stage reads, the digest of the content, and for
files the sizes and frames that are read.

Keys of millions of rows are computed as expressions on whole columns, not row by row in Python.
"""

import json
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import polars as pl
import torch

from diffsynth_dagster.cache.layout import LAYOUT_VERSION
from diffsynth_dagster.cache.manifest import CONTENT_NUMBER, SIGNATURE
from diffsynth_dagster.data.columns import Input
from diffsynth_dagster.data.digests import digest_column
from diffsynth_dagster.data.media.signature import FLAT
from diffsynth_dagster.data.samples import READ_BY, trained_sizes
from diffsynth_dagster.facts import FactCache, digest_of
from diffsynth_dagster.families.contract import Family, Stage
from diffsynth_dagster.weights.models import component_digest
from diffsynth_dagster.weights.resolved import ResolvedModel

KEY_DIGITS = 32
CONTENT, READ_AS = "\x00content:", "\x00sizes:"
"""Prefixes of the columns that `with_contents` adds; no column of a table begins with a null."""


def with_contents(rows: pl.DataFrame, inputs: Sequence[Input]) -> pl.DataFrame:
    """Add the columns that keys are made of to rows of a checked table.

    Returns:
        The rows with `CONTENT + column` for each input, the digest of its content, and for files
        with `READ_AS + column`, the sizes and frames that are read, as JSON text.
    """
    contents = [_content(item).alias(CONTENT + item.column) for item in inputs]
    sizes = [_sizes_read(rows, item) for item in inputs if item.is_file]
    return rows.with_columns(*contents, *sizes)


def _content(item: Input) -> pl.Expr:
    if not item.is_file:
        return digest_column(pl.col(item.column))
    # The check of the table has digested the files already.
    digest = pl.col(f"{item.column}:digest")
    if item.optional:
        digest = digest.fill_null("")  # a null would make the whole key null
    return digest.list.join(",") if item.many else digest


def _sizes_read(rows: pl.DataFrame, item: Input) -> pl.Series:
    """The sizes and frames that each row's files are read at, as JSON text."""
    parts = [pl.col(f"{item.column}:{part}").alias(part) for part in READ_BY]
    texts = rows.select(pl.struct(parts).struct.json_encode()).to_series()
    # A table has few different sizes: Python runs once for each of them, not for each row.
    distinct = texts.unique()
    sizes = [
        json.dumps(trained_sizes(json.loads(t), item), separators=(",", ":")) for t in distinct
    ]
    return texts.replace_strict(distinct, sizes, return_dtype=pl.String).alias(
        READ_AS + item.column
    )


def sample_identity(inputs: Sequence[Input]) -> pl.Expr:
    """The identity of a sample: a digest of its row's contents and of how its files are read.

    Columns that only weigh the sample's loss are left out.
    """
    # Noise and timesteps are drawn from the identity, so it must never change. It is the digest of
    # the JSON value [{column: content}, {file column: sizes and frames}], with sorted keys and
    # without spaces, put together here from columns.
    inputs = [item for item in inputs if not item.weighs]
    parts: list[pl.Expr] = []
    for start, items in (("[{", inputs), ("},{", [i for i in inputs if i.is_file])):
        parts.append(pl.lit(start))
        for index, item in enumerate(sorted(items, key=lambda i: i.column)):
            name = json.dumps(item.column)
            parts.append(pl.lit(("," if index else "") + name + ":"))
            content = pl.format('"{}"', pl.col(CONTENT + item.column))
            parts.append(content if start == "[{" else pl.col(READ_AS + item.column))
    return digest_column(pl.concat_str(*parts, pl.lit("}]"))).str.slice(0, KEY_DIGITS)


def content_number(inputs: Sequence[Input]) -> pl.Expr:
    """A number below 2^64 that depends only on the content of the file that is trained on, which is
    the first that a row names."""
    first = next((i for i in inputs if i.is_file), inputs[0])
    digest = digest_column(pl.concat_str(pl.lit("content="), pl.col(CONTENT + first.column)))
    return digest.str.slice(0, 16).str.to_integer(base=16, dtype=pl.UInt64)


def signature(inputs: Sequence[Input], names: Collection[str]) -> pl.Expr:
    """The signature of the file that is trained on: see `media.signature`.

    Args:
        names: the columns of the checked table. One of an older version has no signatures: they are
            null then.
    """
    first = next((i for i in inputs if i.is_file), None)
    if first is None:
        return pl.lit(FLAT)
    digest, found = pl.col(f"{first.column}:digest"), pl.col(f"{first.column}:signature")
    if f"{first.column}:signature" not in names:
        found = pl.lit(None, pl.String)
    elif first.many:
        digest, found = digest.list.first(), found.list.first()
    return pl.when(digest.is_null()).then(pl.lit(FLAT)).otherwise(found)


def with_content_numbers(rows: pl.LazyFrame, inputs: Sequence[Input]) -> pl.LazyFrame:
    """Add the columns `CONTENT_NUMBER` and `SIGNATURE` to rows of a checked table: see
    `content_number` and `signature`."""
    first = next((i for i in inputs if i.is_file), inputs[0])
    signed = signature(inputs, rows.collect_schema().names()).alias(SIGNATURE)
    rows = rows.with_columns(_content(first).alias(CONTENT + first.column), signed)
    return rows.with_columns(content_number(inputs).alias(CONTENT_NUMBER))


def all_reads(stage: Stage, family: Family) -> list[Input]:
    """The inputs that a stage depends on, directly or through the stages it needs; each once."""
    inputs = list(stage.reads)
    for name in stage.needs:
        inputs += all_reads(family.stage(name), family)
    return list(dict.fromkeys(inputs))


def _all_uses(stage: Stage, family: Family) -> set[str]:
    names = set(stage.uses)
    for name in stage.needs:
        names |= _all_uses(family.stage(name), family)
    return names


def stage_digest(stage: Stage) -> str:
    """Digest of a stage's name, version, outputs and settings."""
    outputs = [[o.name, o.role, o.ragged] for o in stage.yields]
    # Left out when empty: keys from before stages had settings stay valid.
    settings = [[list(pair) for pair in stage.settings]] if stage.settings else []
    return digest_of([stage.name, stage.version, outputs, *settings])


class Keys:
    """Computes the keys of a model's stages.

    Args:
        dtype: the element type that the stages compute in.
        digests: component → digest of its files, for components that the model list lacks.
    """

    def __init__(
        self,
        model: ResolvedModel,
        fact_cache: FactCache,
        dtype: torch.dtype,
        digests: Mapping[str, str] | None = None,
    ) -> None:
        self._model = model
        self._fact_cache = fact_cache
        self._dtype = str(dtype)
        self._digests: dict[str, str] = {
            name: digest
            for name, digest in (digests or {}).items()
            if name not in model.components and name not in model.tokenizers
        }

    def of_rows(self, stage: Stage) -> pl.Expr:
        """The key of every row, as an expression on the columns of `with_contents`.

        Raises:
            WeightsError: a component that the stage uses is missing.
        """
        # Line breaks separate the columns; digests and JSON texts contain none, so that different
        # rows never give the same text.
        parts = [pl.lit(self._context(stage))]
        for item in all_reads(stage, self._model.family):
            parts += [pl.lit(f"\n{item.column}="), pl.col(CONTENT + item.column)]
            if item.is_file:
                parts.append(pl.col(READ_AS + item.column))
        return digest_column(pl.concat_str(parts)).str.slice(0, KEY_DIGITS)

    def weights(self, stages: Sequence[Stage]) -> dict[str, str]:
        """Component or tokenizer → digest of its files, for those that the stages use."""
        return {n: self._digest(n) for n in sorted({n for stage in stages for n in stage.uses})}

    def _context(self, stage: Stage) -> str:
        """Digest of everything in a key that is the same for every row."""
        family = self._model.family
        value: list[Any] = [
            LAYOUT_VERSION,
            family.name,
            stage_digest(stage),
            self._dtype,
            [self._digest(name) for name in sorted(_all_uses(stage, family))],
        ]
        return digest_of(value)

    def _digest(self, component: str) -> str:
        # The weights of a component are many gigabytes: digest them once for all its stages.
        if component not in self._digests:
            self._digests[component] = component_digest(self._model, component, self._fact_cache)
        return self._digests[component]
