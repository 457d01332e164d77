"""The data set of a training: from the table to encoded samples, and where each one is stored.

On the command line these are three calls in one process. In a Dagster job the metadata asset makes
the table, the latents asset encodes it, and the checkpoints asset starts from what was encoded.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
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
from diffsynth_dagster.cache.long_captions import count_long_captions
from diffsynth_dagster.cache.manifest import PLANNED, Manifest, read_manifest
from diffsynth_dagster.cache.plan_samples import plan_samples
from diffsynth_dagster.cache.resolve import Samples, lacking, resolve
from diffsynth_dagster.cache.sample_rows import (
    plan_sample_rows,
    planned_sample_rows,
    sample_rows_config,
)
from diffsynth_dagster.cache.store import Store
from diffsynth_dagster.config.parameters import TrainingConfig
from diffsynth_dagster.data.columns import Columns
from diffsynth_dagster.data.prepare import prepare_data
from diffsynth_dagster.data.table.checked_table import PINNED, read_checked
from diffsynth_dagster.data.table.validate import CheckedTable
from diffsynth_dagster.errors import Stopped
from diffsynth_dagster.facts import FactCache
from diffsynth_dagster.run.events import Encoded, Encoding
from diffsynth_dagster.run.reporting import Reporter
from diffsynth_dagster.run.signals import finishing
from diffsynth_dagster.training.parallel import Parallel
from diffsynth_dagster.weights.models import Models

_HELD_OUT, _COMPARED = "held_out", "compared"


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


def encoded_before(config: TrainingConfig) -> list[Manifest]:
    """The manifest of a data set that was encoded before, and the manifest of the held-out samples
    if they have one of their own. Raises `StoreError`."""
    manifest = read_manifest(Path(config.dataset_base_path))
    held_out = held_out_manifest(config, manifest)
    return [manifest] if held_out is None else [manifest, held_out]


def encode_data(
    config: TrainingConfig,
    parallel: Parallel,
    models: Models,
    fact_cache: FactCache,
    reporter: Reporter,
    stop_asked: Callable[[], bool],
) -> list[Manifest]:
    """Encode what the store lacks of the checked tables in the run folder. Collective.

    Returns:
        The manifest of the data set, and that of the held-out samples if they have a table of
        their own.

    Raises:
        MetadataError: a file has changed since it was checked.
        StoreError: the config forbids encoding, and the store lacks samples.
        Stopped: a signal came.
    """
    held_out = held_out_config(config)
    # The held-out samples first: they are few, and what is wrong with them is known early.
    parts = [config] if held_out is None else [held_out, config]
    manifests = [
        _encode(part, parallel, models, fact_cache, reporter, stop_asked) for part in parts
    ]
    if held_out is None and parallel.is_node_main:
        # An earlier training in this folder may have had a held-out table.
        forget_held_out(config)
    return manifests[::-1]


def register_users(manifests: Sequence[Manifest]) -> None:
    """Name the folders of manifests to their stores, whose clean-up then spares what they use."""
    for manifest in manifests:
        Store(Path(manifest.store)).add_user(manifest.folder)


def _encode(
    config: TrainingConfig,
    parallel: Parallel,
    models: Models,
    fact_cache: FactCache,
    reporter: Reporter,
    stop_asked: Callable[[], bool],
) -> Manifest:
    """Encode what the store lacks of the run folder's checked table; returns the manifest."""
    output = Path(config.output_path)
    with parallel.node_main_first():
        table = read_checked(output, PINNED)
        if parallel.is_node_main:
            # Keys need digests of the model files: one process of a node computes them.
            keys = Keys(models.resolved, fact_cache, models.dtype)
            rows = plan_sample_rows(config, models.resolved, keys, fact_cache)
            plan_samples(config, models.resolved, table, keys, rows)
        planned = read_manifest(output, PLANNED)
        if parallel.is_node_main:
            warning = count_long_captions(models.resolved, table, output, fact_cache).warning
            if warning is not None:
                reporter.warn(warning)
        # The rows that `sample_prompts` names: encoded with the data set, not trained on.
        sampled = planned_sample_rows(output)
    if parallel.is_main_process:
        # Before encoding, so that a clean-up also spares what an interrupted run encoded.
        Store(Path(planned.store)).add_user(output)
    if config.trains_only:
        require_stored(planned)
    else:
        for manifest in [planned] if sampled is None else [planned, sampled.manifest]:
            require_planned_weights(models.resolved, manifest, fact_cache)

        # Called after each batch.
        def progress(stage: str, done: int, total: int) -> None:
            reporter.report(Encoding(stage, done, total))
            if stop_asked():
                raise Stopped

        # A signal stops between batches, so that encoded samples still get into a shard.
        with finishing():
            report = encode_missing(
                config, models, planned, table, parallel, progress, reporter.warn
            )
            if sampled is not None:
                sample_config = sample_rows_config(config)
                encode_missing(
                    sample_config, models, sampled.manifest, sampled.table, parallel, progress
                )
            reporter.report(Encoded(report.hits, report.misses))
        if stop_asked():
            raise Stopped
    # Published only when the shards of all processes are there.
    parallel.wait_for_everyone()
    with parallel.node_main_first():
        if parallel.is_node_main:
            planned.publish()
        return read_manifest(output)


def require_stored(manifest: Manifest) -> None:
    """Refuse a manifest if the store lacks some of its samples. Raises `StoreError`."""
    missing = len(Store(Path(manifest.store)).missing(manifest.keys))
    if missing:
        total = manifest.keys.collect(engine="streaming").height
        raise lacking(missing, total, manifest.store)


@dataclass(frozen=True)
class Resolved:
    """Where the samples of a training are stored: those that are trained on, and those that its
    held-out loss is measured on; see `Parts`. The warnings are known to the process that divided
    them, one of each node."""

    trained: Samples
    held_out: Samples | None
    compared: Samples | None
    warnings: tuple[str, ...] = ()


def resolved_samples(config: TrainingConfig, manifest: Manifest, parallel: Parallel) -> Resolved:
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
            parts = parts_of(config, manifest, folder)
            warnings = parts.warnings
            resolve(parts.trained, folder)
            if parts.held_out is not None and parts.compared is not None:
                resolve(parts.held_out, folder, _HELD_OUT)
                resolve(parts.compared, folder, _COMPARED)
        more = (_HELD_OUT, _COMPARED) if config.holds_out else ()
        held_out, compared = [Samples(folder, name) for name in more] or [None, None]
        return Resolved(Samples(folder), held_out, compared, warnings)
