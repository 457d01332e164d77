"""Keys and identities made from columns: equal for equal content, and those of the plain formula."""

import json
from pathlib import Path
from typing import Any

import polars as pl
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from video_family import EDITS, FIRST, VIDEO, video_family

from diffsynth_dagster.cache.keys import Keys, sample_identity, with_contents
from diffsynth_dagster.cache.plan_samples import tokens
from diffsynth_dagster.config import TrainingConfig
from diffsynth_dagster.data.columns import Input
from diffsynth_dagster.data.digests import digest_rows
from diffsynth_dagster.data.samples import PARTS, files_of, trained_sizes
from diffsynth_dagster.facts import FactCache, digest_of, digest_text
from diffsynth_dagster.families.contract import Family
from diffsynth_dagster.weights.resolved import resolve

FAMILY = video_family(VIDEO, FIRST, EDITS)
_TYPES = {
    "path": pl.String,
    "digest": pl.String,
    "size": pl.Int64,
    "modified": pl.Int64,
    "target": pl.List(pl.Int64),
    "frames": pl.Int64,
    "stride": pl.Float64,
    "shown": pl.List(pl.UInt32),
    "reading": pl.String,
}

captions = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1)
sides = st.integers(1, 64).map(lambda n: 16 * n)
one_file = st.fixed_dictionaries(
    {
        "path": st.text("abc/é ", min_size=1, max_size=8),
        "digest": st.sampled_from(["a" * 64, "b" * 64, "0" * 64]),
        "size": st.integers(0, 3),
        "modified": st.integers(0, 2**62),
        "target": st.tuples(sides, sides).map(list),
        "frames": st.sampled_from([1, 5, 81]),
        "stride": st.one_of(st.just(1.0), st.floats(1e-7, 1e7, allow_nan=False)),
        "shown": st.none() | st.sampled_from([[0, 1], [0, 2]]),
        "reading": st.sampled_from([None, None, "srgb", "background=#ffffff"]),
    }
)


@st.composite
def rows_of(draw: Any, family: Family = FAMILY) -> dict[str, Any]:
    row: dict[str, Any] = {}
    for item in family.inputs:
        if not item.is_file:
            row[item.column] = draw(captions)
            continue
        files = draw(st.lists(one_file, min_size=1, max_size=3)) if item.many else draw(one_file)
        for part in PARTS:
            value = [f[part] for f in files] if item.many else files[part]
            row[f"{item.column}:{part}"] = value
    return row


def table(rows: list[dict[str, Any]]) -> pl.DataFrame:
    schema: dict[str, Any] = {"prompt": pl.String}
    for item in FAMILY.file_inputs:
        for part, kind in _TYPES.items():
            schema[f"{item.column}:{part}"] = pl.List(kind) if item.many else kind
    return pl.DataFrame(rows, schema=schema)


def content(row: dict[str, Any], item: Input) -> str:
    if not item.is_file:
        return digest_text(row[item.column])
    digest = row[f"{item.column}:digest"]
    return ",".join(digest) if item.many else digest


def plain_identity(row: dict[str, Any]) -> str:
    """Row by row, as the noise of every training before has drawn it."""
    inputs = {i.column: content(row, i) for i in FAMILY.inputs}
    read = {i.column: trained_sizes(files_of(row, i), i) for i in FAMILY.file_inputs}
    return digest_of([inputs, read])[:32]


@given(st.lists(rows_of(), min_size=1, max_size=6))
@settings(deadline=None, max_examples=60)
def test_identities_are_those_of_the_plain_formula(rows: list[dict[str, Any]]) -> None:
    made = with_contents(table(rows), FAMILY.inputs).select(sample_identity(FAMILY.inputs))
    assert made.to_series().to_list() == [plain_identity(row) for row in rows]


def keys_of_family(tmp: Path) -> Keys:
    found = resolve(TrainingConfig(), FAMILY)
    return Keys(found, FactCache(tmp / "facts.sqlite"), torch.float32)


@given(st.lists(rows_of(), min_size=2, max_size=8))
@settings(deadline=None, max_examples=60)
def test_keys_are_equal_where_content_and_reading_are(
    tmp_path_factory: Any, rows: list[dict[str, Any]]
) -> None:
    keys = keys_of_family(tmp_path_factory.getbasetemp())
    frame = with_contents(table(rows), FAMILY.inputs)
    for stage in FAMILY.stages:
        made = frame.select(keys.of_rows(stage)).to_series().to_list()
        said = [
            json.dumps(
                [
                    [content(r, i), i.is_file and trained_sizes(files_of(r, i), i)]
                    for i in stage.reads
                ]
            )
            for r in rows
        ]
        for a, text_a in zip(made, said, strict=True):
            for b, text_b in zip(made, said, strict=True):
                assert (a == b) == (text_a == text_b)
    made = [set(frame.select(keys.of_rows(s)).to_series()) for s in FAMILY.stages]
    assert len(set.union(*made)) == sum(len(m) for m in made)


def test_tokens_count_the_patches_of_all_files() -> None:
    row = {
        "prompt": "a",
        **{f"video:{p}": v for p, v in _file([832, 480], 81).items()},
        **{f"first:{p}": v for p, v in _file([64, 32], 1).items()},
        **{f"edits:{p}": [v, v] for p, v in _file([32, 32], 1).items()},
    }
    counted = table([row]).select(tokens(FAMILY.columns)).item()
    assert counted == 52 * 30 * 21 + 4 * 2 + 2 * (2 * 2)


def _file(target: list[int], frames: int) -> dict[str, Any]:
    known: dict[str, Any] = {"path": "a", "digest": "a" * 64, "size": 1, "modified": 1}
    said = {"shown": None, "reading": None}
    return {**known, "target": target, "frames": frames, "stride": 1.0, **said}


def test_the_digest_of_a_table_is_of_its_rows_in_order_however_it_is_cut(tmp_path: Path) -> None:
    frame = pl.DataFrame({"a": range(1000), "b": [f"é {i}" for i in range(1000)]})
    small = tmp_path / "small.parquet"
    frame.write_parquet(small, row_group_size=7)
    assert digest_rows(frame.lazy()) == digest_rows(pl.scan_parquet(small))
    assert digest_rows(frame.lazy()) != digest_rows(frame.reverse().lazy())
    assert digest_rows(frame.lazy()) != digest_rows(frame.rename({"a": "c"}).lazy())
