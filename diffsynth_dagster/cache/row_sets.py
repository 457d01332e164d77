"""The row sets of a training: named sets of rows that go through the same stages.

    train     the rows of the data set
    held_out  the rows of the held-out loss, if they have a table of their own
    samples   the rows that sample pictures are made from

Each has a folder with the same files: its checked table and its manifest. The one of `train` is the
run folder, the others are folders inside it. A set is checked, planned, encoded, published and
resolved by the same functions, whichever it is.
"""

from collections.abc import Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import polars as pl

from diffsynth_dagster.cache.held_out import held_out_config
from diffsynth_dagster.cache.layout import SAMPLES_FOLDER
from diffsynth_dagster.cache.manifest import FILE_NAME, Manifest, read_manifest
from diffsynth_dagster.config.parameters import TrainingConfig
from diffsynth_dagster.data.columns import CAPTION
from diffsynth_dagster.data.table.checked_table import write_checked
from diffsynth_dagster.data.table.sample_rows import check_sample_rows
from diffsynth_dagster.data.table.validate import CheckedTable
from diffsynth_dagster.errors import ParameterError, StoreError
from diffsynth_dagster.facts import FactCache, digest_file
from diffsynth_dagster.families.contract import Family
from diffsynth_dagster.families.sampling_types import guidance_of
from diffsynth_dagster.weights.resolved import ResolvedModel

TRAIN, HELD_OUT, SAMPLES = "train", "held_out", "samples"
_SAME = (
    "give both halves of split training the same sample_prompts, sample_table, sample_cfg_scale and "
    "sample_negative_prompt"
)


@dataclass(frozen=True)
class RowSet:
    """Rows that are encoded together.

    Attributes:
        name: `TRAIN`, `HELD_OUT` or `SAMPLES`.
        config: how they are read and encoded. `output_path` is the folder of the set.
        model: with the stages that the set needs.
        made_of: what the set was asked to hold, as a JSON value: see `Notes`.
    """

    name: str
    config: TrainingConfig
    model: ResolvedModel
    made_of: dict[str, Any]

    @property
    def folder(self) -> Path:
        """The folder of its tables."""
        return Path(self.config.output_path)


def row_sets(config: TrainingConfig, model: ResolvedModel) -> list[RowSet]:
    """The row sets of a config, in the order in which they are encoded."""
    held_out = held_out_config(config)
    # The held-out rows first: they are few, and what is wrong with them is known early.
    sets = [] if held_out is None else [RowSet(HELD_OUT, held_out, model, {})]
    sets.append(RowSet(TRAIN, config, model, {}))
    if config.makes_samples:
        sets.append(sample_set(config, model, Path(config.output_path) / SAMPLES_FOLDER))
    return sets


def sample_set(config: TrainingConfig, model: ResolvedModel, folder: Path) -> RowSet:
    """The rows that samples are made from, as a row set in a folder."""
    changed = {
        # Each of these rows has exactly one caption.
        "caption_lists": False,
        "caption_dropout_rate": 0.0,
        "shuffle_tags": False,
        "output_path": str(folder),
    }
    reduced = replace(model, family=reduced_family(model.family))
    made_of = asked_of_samples(config, model.family)
    return RowSet(SAMPLES, config.model_copy(update=changed), reduced, made_of)


def reduced_family(family: Family) -> Family:
    """The family with only the stages that samples need, and one caption for each row."""
    stages = [
        replace(stage, reads=tuple(replace(i, many=i.many and not i.caption) for i in stage.reads))
        for stage in family.sample_stages
    ]
    return replace(family, stages=tuple(stages))


def asked_of_samples(config: TrainingConfig, family: Family) -> dict[str, Any]:
    """What the row set `samples` of a config is made of, as a JSON value: the prompts or the digest
    of the table, and the negative prompt, None without guidance."""
    guidance = guidance_of(config, family.sampling)
    table = config.sample_table
    given = [*config.sample_prompts] if table is None else _digest(Path(table))
    return {
        "prompts" if table is None else "table": given,
        "negative_prompt": guidance.negative_prompt if guidance.is_on else None,
    }


def _digest(table: Path) -> str | None:
    """Digest of a table; None if it is missing, as it may be in the second half of split
    training."""
    return digest_file(table) if table.is_file() else None


def check_samples_table(row_set: RowSet, family: Family, fact_cache: FactCache) -> CheckedTable:
    """Check the rows of the set `samples`.

    Args:
        family: the whole family: it says which file is trained on.

    Raises:
        MetadataError: see `check_sample_rows`.
    """
    # The file that is trained on is not an input of samples, but its column may give their size.
    columns, files = row_set.model.family.columns, family.file_inputs
    trained = files[0] if files and files[0] not in columns.inputs else None
    return check_sample_rows(row_set.config, columns, trained, fact_cache)


def write_samples_table(row_set: RowSet, family: Family, fact_cache: FactCache) -> None:
    """Check the rows of the set `samples`, and write its checked table.

    With guidance, each row stands there a second time, with the negative prompt: row n + k is row k
    of n without its prompt.

    Raises:
        MetadataError: see `check_sample_rows`.
        OutputError: the run folder cannot be written.
    """
    table = check_samples_table(row_set, family, fact_cache)
    negative = row_set.made_of["negative_prompt"]
    if negative is not None:
        unprompted = table.rows.with_columns(
            pl.lit(negative).alias(CAPTION),
            (pl.col("row") + pl.len()).cast(pl.UInt32).alias("row"),
        )
        table = replace(table, rows=pl.concat([table.rows, unprompted]))
    # Of the table before: if encoding is stopped, it must not be read with this one.
    (row_set.folder / FILE_NAME).unlink(missing_ok=True)
    write_checked(table, row_set.folder, pinned=True)


def needed_beside_prompt(family: Family) -> list[str]:
    """The columns that a sample needs beside its prompt, such as the picture to edit."""
    columns = reduced_family(family).columns.named
    return [i.column for i in columns if i.column != CAPTION and not i.optional]


def find_samples(config: TrainingConfig, family: Family, manifest: Manifest) -> Manifest | None:
    """The manifest of the row set `samples` that was encoded with a data set; None if the data set
    was encoded without samples, or for other ones.

    Args:
        manifest: of the data set.
    """
    try:
        found = read_manifest(manifest.folder / SAMPLES_FOLDER)
    except StoreError:
        return None
    # A first half that was stopped after the data set may have left the samples of an older one.
    of_it = (found.weights.items() <= manifest.weights.items()) and (
        found.stages.items() <= manifest.stages.items()
    )
    fits = _differs(found.made_of, asked_of_samples(config, family)) is None
    return found if fits and of_it and _sizes(found) == _sizes(manifest) else None


def _sizes(manifest: Manifest) -> dict[str, Any]:
    """The parameters of a manifest that rows of samples are read with."""
    names = ("height", "width", "max_pixels", "bucket_step", "num_frames", "frame_rate")
    return {name: manifest.parameters.get(name) for name in names}


def require_encodable_samples(
    config: TrainingConfig, family: Family, manifest: Manifest, components: Collection[str]
) -> None:
    """Refuse samples that were not encoded with the data set and cannot be encoded now.

    Args:
        manifest: of the data set.
        components: the components in the model list.

    Raises:
        ParameterError: the model list lacks a component that encodes them.
    """
    if not config.makes_samples or find_samples(config, family, manifest) is not None:
        return
    how = "without samples"
    with suppress(StoreError):
        made_of = read_manifest(manifest.folder / SAMPLES_FOLDER).made_of
        asked = asked_of_samples(config, family)
        if _holds_all(made_of, asked):
            return
        how = _differs(made_of, asked) or "for samples of another data set"
    lacks = _lacking(family, components)
    if lacks is not None:
        raise ParameterError(
            f"the data set was encoded {how}, and the model list lacks the '{lacks}' to encode them "
            "now",
            where="sample_table" if config.sample_table is not None else "sample_prompts",
            do=f"{_SAME}, or add the files of '{lacks}' to the model list",
        )


def _lacking(family: Family, components: Collection[str]) -> str | None:
    """A component that samples are encoded with and that a model list lacks; None if there is
    none."""
    # `uses` also names tokenizers, which have parameters of their own and are no components.
    buildable = {component.name for component in family.components}
    used: Sequence[str] = [name for stage in family.sample_stages for name in stage.uses]
    return next((n for n in used if n in buildable and n not in components), None)


def _holds_all(made_of: dict[str, Any], asked: dict[str, Any]) -> bool:
    """Whether the prompts that are asked for are among those that were encoded: their keys are in
    the store."""
    prompts, negative = asked.get("prompts"), asked["negative_prompt"]
    known = {*made_of.get("prompts", ())}
    return (
        prompts is not None
        and {*prompts} <= known
        and negative in (None, made_of["negative_prompt"])
    )


def _differs(made_of: dict[str, Any], asked: dict[str, Any]) -> str | None:
    """With which other samples a data set was encoded; None if with those that are asked for."""
    # A table that is gone since is not needed: its rows are encoded.
    if "table" in asked and asked["table"] not in (None, made_of.get("table")):
        return "with another table of samples"
    if "table" in asked and "table" not in made_of:
        return "without a table of samples"
    if "prompts" in asked and made_of.get("prompts") != asked["prompts"]:
        missing = [p for p in asked["prompts"] if p not in made_of.get("prompts", ())]
        return f"without the sample prompt '{missing[0]}'" if missing else "with other prompts"
    # Without guidance, the rows with the negative prompt are not used.
    negative, encoded = asked["negative_prompt"], made_of["negative_prompt"]
    if negative is None or negative == encoded:
        return None
    if encoded is None:
        return f"without the negative prompt '{negative}' that guidance needs"
    return "for samples with another negative prompt"
