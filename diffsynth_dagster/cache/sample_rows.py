"""The rows of the table that `sample_prompts` names, encoded as samples of the data set are.

They have a checked table and a manifest of their own, in a folder inside the run folder; both are
about the stages that samples need. What a training reads of them goes into its own manifest.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from pathlib import Path
from shutil import rmtree

import polars as pl

from diffsynth_dagster.cache.keys import Keys
from diffsynth_dagster.cache.manifest import (
    PLANNED,
    Manifest,
    SampleRow,
    SampleRows,
    read_manifest,
)
from diffsynth_dagster.cache.plan_samples import plan_samples
from diffsynth_dagster.config.parameters import TrainingConfig
from diffsynth_dagster.data.table.checked_table import read_checked, write_checked
from diffsynth_dagster.data.table.sample_rows import check_sample_rows
from diffsynth_dagster.data.table.validate import CheckedTable
from diffsynth_dagster.errors import ParameterError
from diffsynth_dagster.facts import FactCache, digest_file
from diffsynth_dagster.families.contract import Family
from diffsynth_dagster.families.sampling_types import Guidance, guidance_of
from diffsynth_dagster.weights.resolved import ResolvedModel

FOLDER = ".prompts"
_SAME = (
    "give both halves of split training the same sample_prompts, sample_cfg_scale and "
    "sample_negative_prompt"
)


@dataclass(frozen=True)
class SampleTable:
    """The table in a run folder: its rows, checked, and their keys."""

    manifest: Manifest
    table: CheckedTable


def sample_rows_config(config: TrainingConfig) -> TrainingConfig:
    """The config that rows of samples are encoded with: each has one caption."""
    plain = {"caption_lists": False, "caption_dropout_rate": 0.0, "shuffle_tags": False}
    return config.model_copy(update={"sample_prompts": (), **plain})


def plan_sample_rows(
    config: TrainingConfig, model: ResolvedModel, keys: Keys, fact_cache: FactCache
) -> SampleRows | None:
    """Check the table that `sample_prompts` names, and plan its rows; None where it names none.

    With guidance, each row is there with the negative prompt as well, behind all others.

    Raises:
        MetadataError: see `check_sample_rows`.
        OutputError: the run folder cannot be written.
    """
    folder = Path(config.output_path) / FOLDER
    rmtree(folder, ignore_errors=True)
    if config.sample_table is None:
        return None
    family = reduced(model.family)
    table = checked_sample_rows(config, model.family, fact_cache)
    guidance = guidance_of(config, family.sampling)
    if guidance.is_on:
        table = replace(table, rows=_doubled(table.rows, guidance.negative_prompt))
    table = write_checked(table, folder)
    own = sample_rows_config(config).model_copy(update={"output_path": str(folder)})
    planned = plan_samples(own, replace(model, family=family), table, keys)
    rows = _sample_rows(planned)
    count = len(rows) // 2 if guidance.is_on else len(rows)
    negative = guidance.negative_prompt if guidance.is_on else None
    digest = digest_file(Path(config.sample_table))
    return SampleRows(rows[:count], rows[count:], digest, negative)


def checked_sample_rows(
    config: TrainingConfig, family: Family, fact_cache: FactCache
) -> CheckedTable:
    """The table that `sample_prompts` names, checked. Raises `MetadataError`: see `check_sample_rows`."""
    columns, files = reduced(family).columns, family.file_inputs
    trained = files[0] if files and files[0] not in columns.inputs else None
    return check_sample_rows(config, columns, trained, fact_cache)


def planned_sample_rows(folder: Path) -> SampleTable | None:
    """What `plan_sample_rows` wrote into a run folder; None where it wrote nothing."""
    own = folder / FOLDER
    if not own.is_dir():
        return None
    return SampleTable(read_manifest(own, PLANNED), read_checked(own))


def reduced(family: Family) -> Family:
    """The family with the stages that samples need. Those that read nothing but size facts are run
    when a sample is made, which has sizes of its own."""
    stages = (s for s in family.sample_stages if not all(i.kind == "sizes" for i in s.reads))
    return replace(family, stages=tuple(stages))


def require_sample_rows(
    config: TrainingConfig, family: Family, manifest: Manifest, components: Collection[str]
) -> None:
    """Refuse a data set that was encoded without what `sample_prompts` gives.

    Args:
        components: those that the model list has. Texts are encoded by them when samples are made.

    Raises:
        ParameterError: it was: without a text that cannot be encoded later; without the table, or with
            another content of it; or without the negative prompt that guidance needs.
    """
    guidance = guidance_of(config, family.sampling)
    if config.sample_table is None:
        _require_prompts(config, family, manifest, components, guidance)
        return
    path = Path(config.sample_table)
    known = manifest.negative_prompt or ""  # None in data sets of before: it was empty
    checks: tuple[tuple[str, Callable[[], bool]], ...] = (
        ("without a table of samples", lambda: not manifest.sample_rows),
        (
            "with another table of samples",
            lambda: not path.is_file() or digest_file(path) != manifest.sample_table,
        ),
        (
            "for samples without guidance",
            lambda: guidance.is_on and not manifest.unprompted_rows,
        ),
        (
            "for samples with another negative prompt",
            lambda: guidance.is_on and known != guidance.negative_prompt,
        ),
    )
    for said, holds in checks:
        if holds():
            raise ParameterError(
                f"the data set was encoded {said}",
                where=f"sample_prompts = {path}",
                do=f"{_SAME}, or leave sample_prompts out in the second",
            )


def _require_prompts(
    config: TrainingConfig,
    family: Family,
    manifest: Manifest,
    components: Collection[str],
    guidance: Guidance,
) -> None:
    """Refuse texts of samples that are not encoded, and cannot be later. Raises `ParameterError`."""
    texts = {text: f"the sample prompt '{text}'" for text in config.sample_texts}
    if texts and guidance.is_on:
        negative = guidance.negative_prompt
        texts.setdefault(negative, f"the negative prompt '{negative}' that guidance needs")
    buildable = {component.name for component in family.components}
    for text, said in texts.items():
        keys = manifest.prompts.get(text, {})
        used = [n for s in family.sample_stages if s.name not in keys for n in s.uses]
        lacks = [name for name in used if name in buildable and name not in components]
        if lacks:
            raise ParameterError(
                f"the data set was encoded without {said}, and the model list lacks the "
                f"'{lacks[0]}' to encode it now",
                where="sample_prompts, sample_cfg_scale, sample_negative_prompt",
                do=f"{_SAME} (sample_cfg_scale: 1 needs no negative prompt), or add the files of "
                f"'{lacks[0]}' to the model list",
            )


def _doubled(rows: pl.LazyFrame, negative: str) -> pl.LazyFrame:
    """The rows, and behind them the same with the negative prompt."""
    unprompted = rows.with_columns(
        pl.lit(negative).alias("prompt"), (pl.col("row") + pl.len()).cast(pl.UInt32).alias("row")
    )
    return pl.concat([rows, unprompted])


def _sample_rows(planned: Manifest) -> list[SampleRow]:
    def part(row: dict[str, str], start: str) -> dict[str, str]:
        return {n.removeprefix(start): v for n, v in row.items() if n.startswith(start)}

    return [
        SampleRow(
            width=row["width"],
            height=row["height"],
            frames=row["frames"],
            keys=part(row, "key:"),
            inputs=part(row, "input:"),
        )
        for row in planned.frame.sort("row").iter_rows(named=True)
    ]
