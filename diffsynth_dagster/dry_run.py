"""Answers `--dry_run`: what a training would do, and whether its model files and data fit.

The checks are those of the training: see `preflight`. Only the cache of facts about files is
written, and nothing is downloaded.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import polars as pl
import torch
from tqdm import tqdm

from diffsynth_dagster.cache.held_out import divided, held_out_config
from diffsynth_dagster.cache.keys import with_content_numbers
from diffsynth_dagster.cache.layout import SAMPLES_FOLDER
from diffsynth_dagster.cache.long_captions import long_captions_of
from diffsynth_dagster.cache.manifest import FILE_NAME, Manifest
from diffsynth_dagster.cache.records import buckets_of
from diffsynth_dagster.cache.row_sets import check_samples_table, sample_set
from diffsynth_dagster.cache.split import with_settled
from diffsynth_dagster.config.entries import named_entries, start_entries
from diffsynth_dagster.config.parameters import TrainingConfig
from diffsynth_dagster.data.order import StepOrder, order_of, total_steps
from diffsynth_dagster.data.prepare import check_data as check_data_files
from diffsynth_dagster.data.prepare import require_named
from diffsynth_dagster.data.table.folder import open_folder
from diffsynth_dagster.data.table.rows import REPEAT, RowSource
from diffsynth_dagster.data.table.validate import CheckedTable
from diffsynth_dagster.errors import MetadataError
from diffsynth_dagster.facts import fact_cache_of
from diffsynth_dagster.families.contract import Family
from diffsynth_dagster.plan import describe
from diffsynth_dagster.preflight import check_config, check_data, check_encoded, check_headers
from diffsynth_dagster.run.record import RunRecord
from diffsynth_dagster.run.resume_point import state_folders
from diffsynth_dagster.run.start import start_record
from diffsynth_dagster.training.encoded_data import encoded_before
from diffsynth_dagster.training.join import trackers_of
from diffsynth_dagster.training.periodic import SavePoints
from diffsynth_dagster.training.resume import require_going_on
from diffsynth_dagster.weights.adapter_files import read_adapter
from diffsynth_dagster.weights.header import read_headers
from diffsynth_dagster.weights.hub import (
    Downloads,
    ModelHub,
    NotDownloaded,
    require_listed,
    require_there,
)
from diffsynth_dagster.weights.identify import find_model, guess_model
from diffsynth_dagster.weights.lora import read_lora
from diffsynth_dagster.weights.resolved import ResolvedModel

_SHOWN_SIZES = 12  # a data set may have thousands
_FIT = "all are there, and fit"
_DOWNLOADED_LATER = "not all are there: the training downloads them when it begins"


@dataclass(frozen=True)
class FileReport:
    """What the files show.

    Attributes:
        values: added to the plan, as JSON values.
        warnings: those that the training would give before its first step.
    """

    values: Mapping[str, Any]
    warnings: list[str] = field(default_factory=list[str])


@dataclass(frozen=True)
class _Rows:
    """The samples of a data set, one row each.

    Attributes:
        source: where they come from and how many rows have which status, as JSON values.
        trained, held_out: rows with the sizes of each sample.
        manifest: only if the data set was encoded before.
    """

    source: Mapping[str, Any]
    trained: pl.LazyFrame
    held_out: pl.LazyFrame | None
    warnings: list[str] = field(default_factory=list[str])
    manifest: Manifest | None = None


def make_plan(config: TrainingConfig) -> dict[str, Any]:
    """What a training would do, as JSON values. Needs no file, and loads no weights.

    Raises:
        WeightsError: some of the named local model files exist, and others do not.
        StoreError: the encoded data set exists and is damaged.
        ParameterError: the family cannot be recognised without the files; or see `check_config`.
    """
    # What an encoded data set settles is taken over if it is there already.
    if not config.reads_encoded or (Path(config.dataset_base_path) / FILE_NAME).is_file():
        config = with_settled(config)
    require_listed([*named_entries(config), *start_entries(config)])
    model = guess_model(config)
    check_config(config, model)
    return describe(config, model)


def look_at_files(config: TrainingConfig, processes: int | None) -> FileReport:
    """Check the model files and the data of a config.

    Args:
        processes: number of processes of the training; None if it is not known.

    Raises:
        MetadataError: the data does not exist, or too many rows are rejected.
        WeightsError: a model file does not exist, is damaged, or does not fit.
        StoreError: the folder holds no encoded data set, or the store lacks samples of it.
        ParameterError: the files do not fit the config; or the run folder holds an unfinished
            training with other parameters, or no state although `resume` says that there must be
            one.
        OutputError: see `require_going_on`.
        TargetError: see `training.fit.check_loras`.
    """
    config = with_settled(config)
    require_named(config)
    # Refuses a tracker that is not installed.
    trackers_of(config)
    resolved, warnings = look_at_models(config)
    values: dict[str, Any] = {"models": _DOWNLOADED_LATER if resolved is None else _FIT}
    # Without the files, as far as the config tells.
    model = guess_model(config) if resolved is None else resolved
    # A user's function may take hours, or download data: a dry run does not call it.
    if _is_to_be_made(config, model.family):
        if not config.encodes_only:
            require_going_on(config)
        values["data"] = f"made by {config.customized_dataset} when the training begins"
        return FileReport(values, warnings)
    rows = _encoded_rows(config, model) if config.reads_encoded else _checked_rows(config, model)
    values["data"] = {**rows.source, **_counted(rows)}
    if not config.encodes_only:
        buckets = buckets_of(rows.trained)
        # As a function, since a state may have been written on another number of processes.
        order_on = partial(_order, config, buckets)
        require_going_on(config, _record(config, rows.manifest, resolved), order_on, processes)
        values["course"] = _schedule(config, buckets, processes or 1)
    return FileReport(values, [*rows.warnings, *warnings])


def look_at_models(config: TrainingConfig) -> tuple[ResolvedModel | None, list[str]]:
    """The model, if all its files exist, and the warnings about it. Raises: see `look_at_files`."""
    require_there([*named_entries(config), *start_entries(config)])
    hub = ModelHub.from_environment()
    try:
        model = find_model(config, hub if hub.skip_download else Downloads())
    except NotDownloaded:
        # What can be checked without the model is checked now.
        _read_starts(config)
        return None, []
    warnings = list(model.family.warnings)
    # As without DeepSpeed, which the launcher decides.
    check_headers(config, model, torch.float32, warnings.append)
    return model, warnings


def _read_starts(config: TrainingConfig) -> None:
    """Read the files that the training starts from, without checking whether they fit the model.
    Raises `WeightsError`: one is damaged, or of another kind."""
    family = guess_model(config).family
    if config.preset_lora_path is not None:
        name = config.preset_lora_model or family.denoiser
        read_lora(Path(config.preset_lora_path), family, name, "preset_lora_path")
    if config.lora_checkpoint is not None:
        read = read_lora if config.lora_method == "lora" else read_adapter
        for name in config.lora_base_model:
            read(Path(config.lora_checkpoint), family, name, "lora_checkpoint")
    if config.resume_from_checkpoint is not None:
        read_headers([Path(config.resume_from_checkpoint)])


def _is_to_be_made(config: TrainingConfig, family: Family) -> bool:
    """Whether a function is to make the data set and has not done so yet. It is not called here."""
    if config.customized_dataset is None or config.dataset_metadata_path is None:
        return False
    held_out = held_out_config(config)
    configs = [config] if held_out is None else [config, held_out]
    return not all(_is_made(data, family) for data in configs)


def _is_made(config: TrainingConfig, family: Family) -> bool:
    """Whether the table of a data set exists. A folder of files is a table if it holds samples."""
    source = RowSource.of(config)
    if not source.is_folder:
        return source.path.exists()
    try:
        open_folder(source.path, source.base, family.columns.files[0], (), source.left_out)
    except MetadataError:
        return False
    return True


def _checked_rows(config: TrainingConfig, model: ResolvedModel) -> _Rows:
    """Check the table of a data set; returns its accepted rows. Raises: see `look_at_files`."""
    held_out_data, columns = held_out_config(config), model.family.columns
    tables: list[CheckedTable] = []
    with fact_cache_of(config.cache_path) as facts:
        for data in [config] if held_out_data is None else [config, held_out_data]:
            with tqdm(desc="check files", unit="file", delay=2, disable=None) as bar:
                signed = config.holds_out
                tables.append(check_data_files(data, columns, facts, bar.update, signed))
        check_data(config, model, tables)
        if config.sample_table is not None:
            folder = Path(config.output_path) / SAMPLES_FOLDER  # nothing is written into it
            check_samples_table(sample_set(config, model, folder), model.family, facts)
    # Equal content gets equal numbers, so that copies of a sample are held out together.
    numbered = [with_content_numbers(table.accepted, columns.inputs) for table in tables]
    second = numbered[1] if held_out_data is not None else None
    apart = divided(config, numbered[0], second)
    source = _statuses(tables[0])
    if held_out_data is not None:
        source["held_out_rows"] = _statuses(tables[1])
    warnings = [*tables[0].warnings(), *apart.warnings]
    # Captions are counted in tokens, for which the tokenizers must be there.
    long = long_captions_of(model, tables[0]).said if model.components else None
    warnings += [] if long is None else [long]
    return _Rows(source, apart.trained, apart.held_out, warnings)


def _statuses(table: CheckedTable) -> dict[str, Any]:
    """The number of rows of each status, and why the first rejected rows were rejected."""
    rejected = table.first_rejected()
    return {"rows": table.counts, **({"rejected": rejected} if rejected else {})}


def _encoded_rows(config: TrainingConfig, model: ResolvedModel) -> _Rows:
    """Check a data set that was encoded before; returns its rows. Raises: see `look_at_files`."""
    manifests = encoded_before(config, model.family)
    manifest, held_out = manifests.train, manifests.held_out
    with fact_cache_of(config.cache_path) as facts:
        check_encoded(config, model, manifests, facts)
    apart = divided(config, manifest.rows, None if held_out is None else held_out.rows)
    rows, warnings = (apart.trained, apart.held_out), [*apart.warnings]
    return _Rows({"encoded": str(manifest.folder)}, *rows, warnings, manifest)


def _record(
    config: TrainingConfig, manifest: Manifest | None, model: ResolvedModel | None
) -> RunRecord | None:
    """The record of the training, which is compared with the states in its run folder. None if
    there are no states, or if the samples or the model are not known yet. Raises: see
    `start_record`."""
    if manifest is None or model is None or not state_folders(Path(config.output_path)):
        return None
    with fact_cache_of(config.cache_path) as facts:
        return start_record(config, model, manifest, facts)


def _counted(rows: _Rows) -> dict[str, Any]:
    """The number of samples, in all and of each size, the most frequent size first."""
    buckets = buckets_of(rows.trained)
    sides = ("width", "height", "frames")
    # Samples of one size are in several buckets if their repeats differ.
    by_size = buckets.group_by(sides).agg(pl.col("len").sum())
    by_size = by_size.sort("len", *sides, descending=[True, False, False, False])
    sizes: dict[str, int] = {}
    for width, height, frames, count in by_size.head(_SHOWN_SIZES).iter_rows():
        # An image has one frame, which is not shown.
        sizes[f"{width}x{height}" + (f"x{frames}" if frames > 1 else "")] = count
    more = by_size.slice(_SHOWN_SIZES)
    if more.height:
        sizes[f"{more.height} other sizes"] = int(more["len"].sum())
    counts = {"samples": int(buckets["len"].sum())}
    if rows.held_out is not None:
        counts["held_out"] = rows.held_out.select(pl.len()).collect().item()
    return {**counts, "sizes": sizes, "buckets": buckets.height}


def _order(config: TrainingConfig, buckets: pl.DataFrame, processes: int) -> StepOrder:
    """The order of the samples on a number of processes."""
    sizes: list[int] = buckets["len"].to_list()
    repeats: list[int] = buckets[REPEAT].to_list() if REPEAT in buckets.columns else []
    return order_of(config, sizes, processes, repeats)


def _schedule(config: TrainingConfig, buckets: pl.DataFrame, processes: int) -> dict[str, Any]:
    """The number of optimizer steps, and how often each sample is seen."""
    order = _order(config, buckets, processes)
    steps = total_steps(config, order.steps_per_epoch)
    epochs, samples = steps / order.steps_per_epoch, int(buckets["len"].sum())
    return {
        "processes": processes,
        "steps": steps,
        "steps_per_epoch": order.steps_per_epoch,
        "epochs": round(epochs, 2),
        "checkpoints": SavePoints(config, order.steps_per_epoch, steps).count,
        "visits_of_a_sample": round(epochs * order.samples_per_epoch / samples, 2),
        **({"repeats": _repeats(buckets)} if REPEAT in buckets.columns else {}),
    }


def _repeats(buckets: pl.DataFrame) -> dict[str, int]:
    """How often a pass over the data set takes a sample → the number of such samples."""
    counted = buckets.group_by(REPEAT).agg(pl.col("len").sum()).sort(REPEAT)
    return {f"{often} times": count for often, count in counted.iter_rows()}
