"""The rows of the table that `sample_prompts` names. They are encoded like rows of the data set.

They have their own checked table and manifest, in a folder inside the run folder, with only the
stages that sample images need. Their keys and inputs are copied into the training's manifest.
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
"""The folder inside the run folder."""
_SAME = (
    "give both halves of split training the same sample_prompts, sample_cfg_scale and "
    "sample_negative_prompt"
)


@dataclass(frozen=True)
class SampleTable:
    """The checked table of `sample_prompts` in a run folder, and the manifest with its keys."""

    manifest: Manifest
    table: CheckedTable


def sample_rows_config(config: TrainingConfig) -> TrainingConfig:
    """The config that these rows are encoded with: each has exactly one caption."""
    one_caption = {"caption_lists": False, "caption_dropout_rate": 0.0, "shuffle_tags": False}
    return config.model_copy(update={"sample_prompts": (), **one_caption})


def plan_sample_rows(
    config: TrainingConfig, model: ResolvedModel, keys: Keys, fact_cache: FactCache
) -> SampleRows | None:
    """Check the table that `sample_prompts` names and compute the keys of its rows.

    Returns:
        The rows; None if `sample_prompts` names no table.

    Raises:
        MetadataError: see `check_sample_rows`.
        OutputError: the run folder cannot be written.
    """
    folder = Path(config.output_path) / FOLDER
    rmtree(folder, ignore_errors=True)  # an earlier training may have left a table
    if config.sample_table is None:
        return None
    family = reduced(model.family)
    table = checked_sample_rows(config, model.family, fact_cache)
    guidance = guidance_of(config, family.sampling)
    # Guidance needs every row a second time, with the negative prompt: appended to the table, they
    # are encoded like the others, and split off again below.
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
    """Check the table that `sample_prompts` names.

    Raises:
        MetadataError: see `check_sample_rows`.
    """
    # The file that is trained on is not an input of samples, but its column may give their size.
    columns, files = reduced(family).columns, family.file_inputs
    trained = files[0] if files and files[0] not in columns.inputs else None
    return check_sample_rows(config, columns, trained, fact_cache)


def planned_sample_rows(folder: Path) -> SampleTable | None:
    """Read what `plan_sample_rows` wrote into a run folder; None if it wrote nothing."""
    subfolder = folder / FOLDER
    if not subfolder.is_dir():
        return None
    return SampleTable(read_manifest(subfolder, PLANNED), read_checked(subfolder))


def reduced(family: Family) -> Family:
    """The family with only the stages that sample images need."""
    # Stages that read only sizes are not encoded here: they run when a sample is made, since its
    # size may differ from the row's.
    stages = (s for s in family.sample_stages if not all(i.kind == "sizes" for i in s.reads))
    return replace(family, stages=tuple(stages))


def require_sample_rows(
    config: TrainingConfig, family: Family, manifest: Manifest, components: Collection[str]
) -> None:
    """Refuse a data set that was encoded without the rows or texts that `sample_prompts` asks for.

    Args:
        components: the components in the model list. Texts that are not encoded yet can be encoded
            with them when samples are made.

    Raises:
        ParameterError: the table of samples was not encoded, or with another content; or a text or
            the negative prompt was not, and the model list lacks a component to encode it now.
    """
    guidance = guidance_of(config, family.sampling)
    if config.sample_table is None:
        _require_prompts(config, family, manifest, components, guidance)
        return
    path = Path(config.sample_table)
    # Older data sets do not say what the negative prompt was: it was always empty then.
    encoded_negative = manifest.negative_prompt or ""
    # Evaluated in this order until one holds: the first is the cause of those after it.
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
            lambda: guidance.is_on and encoded_negative != guidance.negative_prompt,
        ),
    )
    for how, holds in checks:
        if holds():
            raise ParameterError(
                f"the data set was encoded {how}",
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
    """Refuse texts that are not encoded and cannot be encoded now. Raises `ParameterError`."""
    # Text → what it is called in the message.
    texts = {text: f"the sample prompt '{text}'" for text in config.sample_texts}
    if texts and guidance.is_on:
        negative = guidance.negative_prompt
        texts.setdefault(negative, f"the negative prompt '{negative}' that guidance needs")
    buildable = {component.name for component in family.components}
    for text, description in texts.items():
        keys = manifest.prompts.get(text, {})
        used = [n for s in family.sample_stages if s.name not in keys for n in s.uses]
        # `uses` also names tokenizers, which have parameters of their own and are no components.
        lacks = [name for name in used if name in buildable and name not in components]
        if lacks:
            raise ParameterError(
                f"the data set was encoded without {description}, and the model list lacks the "
                f"'{lacks[0]}' to encode it now",
                where="sample_prompts, sample_cfg_scale, sample_negative_prompt",
                do=f"{_SAME} (sample_cfg_scale: 1 needs no negative prompt), or add the files of "
                f"'{lacks[0]}' to the model list",
            )


def _doubled(rows: pl.LazyFrame, negative: str) -> pl.LazyFrame:
    """The rows, followed by the same rows with the negative prompt."""
    # Row numbers go on, so that every row keeps a number of its own.
    unprompted = rows.with_columns(
        pl.lit(negative).alias("prompt"), (pl.col("row") + pl.len()).cast(pl.UInt32).alias("row")
    )
    return pl.concat([rows, unprompted])


def _sample_rows(planned: Manifest) -> list[SampleRow]:
    """The rows of a manifest of samples, in order."""

    def part(row: dict[str, str], prefix: str) -> dict[str, str]:
        return {n.removeprefix(prefix): v for n, v in row.items() if n.startswith(prefix)}

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
