"""Keys of encoded samples: digests of all that a stage's outputs depend on, made from columns.

A key is BLAKE3 of a text, in 32 hexadecimal digits (128 bits). The text has two parts: what is the
same for every row (the stage, the weights it uses, the element type), and what the row says: the
digest of each column's content, and for files the sizes and frames they are read at.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import polars as pl
import torch

from diffsynth_dagster.cache.layout import LAYOUT_VERSION
from diffsynth_dagster.cache.manifest import CONTENT_NUMBER
from diffsynth_dagster.data.columns import Input
from diffsynth_dagster.data.digests import digest_column
from diffsynth_dagster.data.samples import READ_BY, trained_sizes
from diffsynth_dagster.facts import FactCache, digest_of, digest_text
from diffsynth_dagster.families.contract import Family, Stage
from diffsynth_dagster.weights.models import component_digest
from diffsynth_dagster.weights.resolved import ResolvedModel

KEY_DIGITS = 32
CONTENT, READ_AS = "\x00content:", "\x00sizes:"
"""How the columns of `with_contents` begin."""


def with_contents(rows: pl.DataFrame, inputs: Sequence[Input]) -> pl.DataFrame:
    """Rows of a checked table with what keys are made of: for each input the digest of its content,
    and for files how they are read, as JSON text."""
    contents = [_content(item).alias(CONTENT + item.column) for item in inputs]
    sizes = [_sizes_read(rows, item) for item in inputs if item.is_file]
    return rows.with_columns(*contents, *sizes)


def _content(item: Input) -> pl.Expr:
    if not item.is_file:
        return digest_column(pl.col(item.column))
    digest = pl.col(f"{item.column}:digest")
    if item.optional:
        digest = digest.fill_null("")
    return digest.list.join(",") if item.many else digest


def _sizes_read(rows: pl.DataFrame, item: Input) -> pl.Series:
    """How each row's files are read, as JSON text. Rows have few different values of it."""
    parts = [pl.col(f"{item.column}:{part}").alias(part) for part in READ_BY]
    texts = rows.select(pl.struct(parts).struct.json_encode()).to_series()
    distinct = texts.unique()
    worded = [
        json.dumps(trained_sizes(json.loads(t), item), separators=(",", ":")) for t in distinct
    ]
    return texts.replace_strict(distinct, worded, return_dtype=pl.String).alias(
        READ_AS + item.column
    )


def sample_identity(inputs: Sequence[Input]) -> pl.Expr:
    """What identifies a sample: a digest of what its row says and how its files are read.

    Noise and timesteps are drawn from it, so that it must stay what it is: the digest of the JSON
    value [{column: content}, {file column: sizes and frames}], with sorted keys and without spaces.
    What only weighs the sample's loss is not in it.
    """
    inputs = [item for item in inputs if not item.weighs]
    parts: list[pl.Expr] = []
    for start, listed in (("[{", inputs), ("},{", [i for i in inputs if i.is_file])):
        parts.append(pl.lit(start))
        for index, item in enumerate(sorted(listed, key=lambda i: i.column)):
            name = json.dumps(item.column)
            parts.append(pl.lit(("," if index else "") + name + ":"))
            content = pl.format('"{}"', pl.col(CONTENT + item.column))
            parts.append(content if start == "[{" else pl.col(READ_AS + item.column))
    return digest_column(pl.concat_str(*parts, pl.lit("}]"))).str.slice(0, KEY_DIGITS)


def content_number(inputs: Sequence[Input]) -> pl.Expr:
    """A number between 0 and 2 to the 64 that follows from the content of the file that is trained on,
    the first that a row names, and of nothing else."""
    first = next((i for i in inputs if i.is_file), inputs[0])
    digest = digest_column(pl.concat_str(pl.lit("content="), pl.col(CONTENT + first.column)))
    return digest.str.slice(0, 16).str.to_integer(base=16, dtype=pl.UInt64)


def with_content_numbers(rows: pl.LazyFrame, inputs: Sequence[Input]) -> pl.LazyFrame:
    """Rows of a checked table with their `content_number` as `CONTENT_NUMBER`."""
    first = next((i for i in inputs if i.is_file), inputs[0])
    rows = rows.with_columns(_content(first).alias(CONTENT + first.column))
    return rows.with_columns(content_number(inputs).alias(CONTENT_NUMBER))


def all_reads(stage: Stage, family: Family) -> list[Input]:
    """The inputs that a stage depends on, itself or through its needs."""
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
    """Digest of what a stage yields: its name, its version, its outputs, and its settings if any."""
    outputs = [[o.name, o.role, o.ragged] for o in stage.yields]
    settings = [[list(pair) for pair in stage.settings]] if stage.settings else []
    return digest_of([stage.name, stage.version, outputs, *settings])


class Keys:
    """Makes the keys of the stages of a model.

    Args:
        dtype: element type that the stages are computed in.
    """

    def __init__(self, model: ResolvedModel, fact_cache: FactCache, dtype: torch.dtype) -> None:
        self._found = model
        self._fact_cache = fact_cache
        self._dtype = str(dtype)
        self._digests: dict[str, str] = {}

    def of_rows(self, stage: Stage) -> pl.Expr:
        """The key of every row that `with_contents` gave.

        Raises:
            WeightsError: a component that the stage uses is missing.
        """
        parts = [pl.lit(self._context(stage))]
        for item in all_reads(stage, self._found.family):
            parts += [pl.lit(f"\n{item.column}="), pl.col(CONTENT + item.column)]
            if item.is_file:
                parts.append(pl.col(READ_AS + item.column))
        return digest_column(pl.concat_str(parts)).str.slice(0, KEY_DIGITS)

    def of_prompt(self, stage: Stage, prompt: str) -> str:
        """The key of a prompt, for a stage that reads nothing but texts. Raises `WeightsError`."""
        texts = all_reads(stage, self._found.family)
        said = "".join(f"\n{item.column}={digest_text(prompt)}" for item in texts)
        return digest_text(self._context(stage) + said)[:KEY_DIGITS]

    def weights(self, stages: Sequence[Stage]) -> dict[str, str]:
        """Component or tokenizer → digest of its files, for all that the stages use."""
        return {n: self._digest(n) for n in sorted({n for stage in stages for n in stage.uses})}

    def _context(self, stage: Stage) -> str:
        """Digest of what a key depends on beside the row."""
        family = self._found.family
        value: list[Any] = [
            LAYOUT_VERSION,
            family.name,
            stage_digest(stage),
            self._dtype,
            [self._digest(name) for name in sorted(_all_uses(stage, family))],
        ]
        return digest_of(value)

    def _digest(self, component: str) -> str:
        if component not in self._digests:
            self._digests[component] = component_digest(self._found, component, self._fact_cache)
        return self._digests[component]


def prompt_keys(
    prompts: Sequence[str], stages: Sequence[Stage], keys: Keys
) -> Mapping[str, Mapping[str, str]]:
    """Prompt → stage → key, for the stages that read nothing but texts."""
    return {p: {s.name: keys.of_prompt(s, p) for s in stages} for p in dict.fromkeys(prompts)}
