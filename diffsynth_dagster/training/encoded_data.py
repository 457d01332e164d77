"""The data set of a training: from the table to encoded samples, and where each one is stored.

On the command line these are three calls in one process. In a Dagster job the metadata asset makes
the table, the latents asset encodes it, and the checkpoints asset starts from what was encoded.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from tqdm import tqdm

from diffsynth_dagster.cache.encode import encode_missing
from diffsynth_dagster.cache.encoded_for import require_planned_weights
from diffsynth_dagster.cache.held_out import (
    forget_held_out,
    forget_parts,
    held_out_config,
    held_out_manifest,
    parts_of,
)
from diffsynth_dagster.cache.keys import Keys
from diffsynth_dagster.cache.layout import EVALUATED_FOLDER, SAMPLES_FOLDER
from diffsynth_dagster.cache.long_captions import count_long_captions
from diffsynth_dagster.cache.manifest import PLANNED, Manifest, read_manifest
from diffsynth_dagster.cache.plan_samples import plan_samples
from diffsynth_dagster.cache.resolve import Samples, lacking, resolve
from diffsynth_dagster.cache.row_sets import (
    HELD_OUT,
    SAMPLES,
    TRAIN,
    RowSet,
    find_samples,
    row_sets,
    sample_set,
    write_samples_table,
)
from diffsynth_dagster.cache.sampled_rows import SampledRows
from diffsynth_dagster.cache.store import Store
from diffsynth_dagster.config.parameters import TrainingConfig
from diffsynth_dagster.data.columns import Columns
from diffsynth_dagster.data.prepare import prepare_data
from diffsynth_dagster.data.table.checked_table import PINNED, read_checked
from diffsynth_dagster.data.table.validate import CheckedTable
from diffsynth_dagster.errors import Stopped
from diffsynth_dagster.facts import FactCache, fact_cache_of
from diffsynth_dagster.families.contract import Family
from diffsynth_dagster.files import remove
from diffsynth_dagster.run.events import Encoded, Encoding
from diffsynth_dagster.run.reporting import Reporter
from diffsynth_dagster.run.signals import finishing
from diffsynth_dagster.training.parallel import Parallel
from diffsynth_dagster.weights.models import Models

COMPARED, SAMPLED, EVALUATED = "compared", "sampled", "evaluated"
"""Names of resolved rows, beside the names of row sets: see `cache.resolve`."""


def open_store(config: TrainingConfig) -> Store:
    """The store that a config reads: `cache_path`, or the store of the encoded data set that it
    names."""
    if config.dataset_metadata_path is not None:
        return Store(Path(config.cache_path))
    return Store(Path(read_manifest(Path(config.dataset_base_path)).store))


def checked_table(
    config: TrainingConfig,
    columns: Columns,
    fact_cache: FactCache,
    parallel: Parallel,
    check: Callable[[CheckedTable], None],
) -> CheckedTable | None:
    """The checked table of a config; None if the data set was encoded before. Collective.

    One process of each node makes and checks it; the others read what it wrote. If the held-out
    samples have a table of their own, that is made and checked too.

    Args:
        columns: of the model's family.
        check: called with each table by the process that made it.

    Raises:
        MetadataError, ParameterError: see `prepare_data`; and whatever `check` raises.
    """
    if config.dataset_metadata_path is None:
        return None
    with parallel.node_main_first():
        # The main process of the node entered first and has written the table.
        if not parallel.is_node_main:
            return read_checked(Path(config.output_path), PINNED)
        held_out = held_out_config(config)
        tables: list[CheckedTable] = []
        for data in [config] if held_out is None else [config, held_out]:
            with tqdm(desc="check files", unit="file", delay=2, disable=None) as bar:
                signed = config.holds_out
                table = prepare_data(data, columns, fact_cache, bar.update, True, signed=signed)
                tables.append(table)
            check(tables[-1])
        return tables[0]


@dataclass(frozen=True)
class Manifests:
    """The manifests of the row sets of a training; None for a set that it does not have."""

    train: Manifest
    held_out: Manifest | None = None
    samples: Manifest | None = None

    @property
    def all(self) -> list[Manifest]:
        """Those that there are, the one of `train` first."""
        return [m for m in (self.train, self.held_out, self.samples) if m is not None]


def encoded_before(config: TrainingConfig, family: Family) -> Manifests:
    """The manifests of a data set that was encoded before. Raises `StoreError`.

    Rows of samples that were not encoded with it are missing: see `encode_samples`.
    """
    manifest = read_manifest(Path(config.dataset_base_path))
    held_out = held_out_manifest(config, manifest)
    samples = find_samples(config, family, manifest) if config.makes_samples else None
    return Manifests(manifest, held_out, samples)


def encode_data(
    config: TrainingConfig,
    parallel: Parallel,
    models: Models,
    fact_cache: FactCache,
    reporter: Reporter,
    stop_asked: Callable[[], bool],
) -> Manifests:
    """Encode what the store lacks of the row sets of a config. Collective.

    Raises:
        MetadataError: a file has changed since it was checked, or a row of the samples cannot be
            used.
        StoreError: the config forbids encoding, and the store lacks samples.
        Stopped: a signal came.
    """
    sets = row_sets(config, models.resolved)
    # All of them are planned first: a mistake in a table of samples is known before anything is
    # encoded.
    planned = [_plan(row_set, parallel, models, fact_cache, reporter) for row_set in sets]
    found = {
        row_set.name: _encode(row_set, plan, parallel, models, fact_cache, reporter, stop_asked)
        for row_set, plan in zip(sets, planned, strict=True)
    }
    if HELD_OUT not in found and parallel.is_node_main:
        # An earlier training in this folder may have had a held-out table.
        forget_held_out(config)
    if SAMPLES not in found and parallel.is_node_main:
        remove(Path(config.output_path) / SAMPLES_FOLDER)
    return Manifests(found[TRAIN], found.get(HELD_OUT), found.get(SAMPLES))


def encode_samples(
    config: TrainingConfig,
    manifests: Manifests,
    parallel: Parallel,
    models: Models,
    fact_cache: FactCache,
    reporter: Reporter,
    stop_asked: Callable[[], bool],
) -> Manifests:
    """Encode the rows of samples in the run folder, for a data set that was encoded before without
    them. Collective.

    Raises:
        MetadataError, Stopped: see `encode_data`.
    """
    if not config.makes_samples or manifests.samples is not None:
        return manifests
    own = sample_set(config, models.resolved, Path(config.output_path) / SAMPLES_FOLDER)
    # The training reads what was encoded, but these rows are encoded now.
    own = replace(own, config=own.config.model_copy(update={"task": "sft:data_process"}))
    # A prompt that was encoded with the data set is found without the text encoder.
    digests = manifests.train.weights
    plan = _plan(own, parallel, models, fact_cache, reporter, digests)
    made = _encode(own, plan, parallel, models, fact_cache, reporter, stop_asked)
    return replace(manifests, samples=made)


class _Alone:
    """What `encode_missing` asks of the processes of a job, for one that encodes alone."""

    process_index, num_processes = 0, 1

    def wait_for_everyone(self) -> None:
        """There is nobody to wait for."""


def encode_prompts(
    config: TrainingConfig, models: Models, manifest: Manifest, prompts: Sequence[str]
) -> SampledRows:
    """Encode prompts that a user's evaluation asks for, in this process alone.

    Args:
        manifest: of the data set. It has the digests of components that the model list lacks: a
            prompt that was encoded with it is found all the same.

    Raises:
        WeightsError: a component is missing that encodes a prompt that the store lacks.
    """
    folder = Path(config.output_path)
    asked = config.model_copy(update={"sample_prompts": tuple(prompts), "sample_table": None})
    row_set = sample_set(asked, models.resolved, folder / EVALUATED_FOLDER)
    with fact_cache_of(config.cache_path) as fact_cache:
        write_samples_table(row_set, models.resolved.family, fact_cache)
        keys = Keys(row_set.model, fact_cache, models.dtype, manifest.weights)
        table = read_checked(row_set.folder, PINNED)
        planned = plan_samples(row_set.config, row_set.model, table, keys, row_set.made_of)
    encode_missing(row_set.config, models, planned, table, _Alone())
    return SampledRows(planned, resolve(planned, folder, EVALUATED))


def register_users(manifests: Manifests) -> None:
    """Name the folders of manifests to their stores, whose clean-up then spares what they use."""
    for manifest in manifests.all:
        Store(Path(manifest.store)).add_user(manifest.folder)


@dataclass(frozen=True)
class _Plan:
    """A row set that is about to be encoded: its checked table, and its manifest."""

    table: CheckedTable
    manifest: Manifest


def _plan(
    row_set: RowSet,
    parallel: Parallel,
    models: Models,
    fact_cache: FactCache,
    reporter: Reporter,
    digests: Mapping[str, str] | None = None,
) -> _Plan:
    """Plan what a row set is encoded to. Collective.

    Args:
        digests: of components that the model list lacks: see `Keys`.
    """
    folder, resolved = row_set.folder, models.resolved
    of_samples = row_set.name == SAMPLES
    with parallel.node_main_first():
        if of_samples and parallel.is_node_main:
            write_samples_table(row_set, resolved.family, fact_cache)
        table = read_checked(folder, PINNED)
        if parallel.is_node_main:
            # Keys need digests of the model files: one process of a node computes them.
            keys = Keys(row_set.model, fact_cache, models.dtype, digests)
            plan_samples(row_set.config, row_set.model, table, keys, row_set.made_of)
        planned = read_manifest(folder, PLANNED)
        if parallel.is_node_main and not of_samples:
            warning = count_long_captions(resolved, table, folder, fact_cache).warning
            if warning is not None:
                reporter.warn(warning)
    return _Plan(table, planned)


def _encode(
    row_set: RowSet,
    plan: _Plan,
    parallel: Parallel,
    models: Models,
    fact_cache: FactCache,
    reporter: Reporter,
    stop_asked: Callable[[], bool],
) -> Manifest:
    """Encode what the store lacks of a row set; returns its manifest. Collective."""
    folder, table, planned = row_set.folder, plan.table, plan.manifest
    of_samples = row_set.name == SAMPLES
    if parallel.is_main_process:
        # Before encoding, so that a clean-up also spares what an interrupted run encoded.
        Store(Path(planned.store)).add_user(folder)
    if row_set.config.trains_only:
        require_stored(planned)
    else:
        require_planned_weights(models.resolved, planned, fact_cache)

        # Called after each batch.
        def progress(stage: str, done: int, total: int) -> None:
            if not of_samples:
                reporter.report(Encoding(stage, done, total))
            if stop_asked():
                raise Stopped

        # A signal stops between batches, so that encoded samples still get into a shard.
        with finishing():
            report = encode_missing(
                row_set.config, models, planned, table, parallel, progress, reporter.warn
            )
            if not of_samples:
                reporter.report(Encoded(report.hits, report.misses))
        if stop_asked():
            raise Stopped
    # Published only when the shards of all processes are there.
    parallel.wait_for_everyone()
    with parallel.node_main_first():
        if parallel.is_node_main:
            planned.publish()
        return read_manifest(folder)


def require_stored(manifest: Manifest) -> None:
    """Refuse a manifest if the store lacks some of its samples. Raises `StoreError`."""
    missing = len(Store(Path(manifest.store)).missing(manifest.keys))
    if missing:
        total = manifest.keys.collect(engine="streaming").height
        raise lacking(missing, total, manifest.store)


@dataclass(frozen=True)
class Resolved:
    """Where the samples of a training are stored: those that are trained on, those that its
    held-out loss is measured on (see `Parts`), and the rows that samples are made from. The
    warnings are known to the process that divided them, one of each node."""

    trained: Samples
    held_out: Samples | None
    compared: Samples | None
    sampled: SampledRows | None
    warnings: tuple[str, ...] = ()


def resolved_samples(config: TrainingConfig, manifests: Manifests, parallel: Parallel) -> Resolved:
    """Where each sample of a manifest is stored. Collective: one process of each node writes this
    to files, and all map the files.

    Raises:
        StoreError: the store lacks a sample.
        ParameterError, MetadataError: see `parts_of`.
    """
    folder = Path(config.output_path)
    warnings: tuple[str, ...] = ()
    with parallel.node_main_first():
        if parallel.is_node_main:
            forget_parts(config, folder)
            parts = parts_of(config, manifests.train, folder)
            warnings = parts.warnings
            resolve(parts.trained, folder)
            if parts.held_out is not None and parts.compared is not None:
                resolve(parts.held_out, folder, HELD_OUT)
                resolve(parts.compared, folder, COMPARED)
            if manifests.samples is not None:
                resolve(manifests.samples, folder, SAMPLED)
        more = (HELD_OUT, COMPARED) if config.holds_out else ()
        held_out, compared = [Samples(folder, name) for name in more] or [None, None]
        sampled = None
        if manifests.samples is not None:
            sampled = SampledRows(manifests.samples, Samples(folder, SAMPLED))
        return Resolved(Samples(folder), held_out, compared, sampled, warnings)
