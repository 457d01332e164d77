"""The data set of a training: table → encoded samples → where each of them lies.

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
    """The store that a config reads: its own, or that of the encoded data set it names."""
    if config.dataset_metadata_path is not None:
        return Store(Path(config.cache_path))
    return Store(Path(read_manifest(Path(config.dataset_base_path)).store))


def checked_table(
    config: TrainingConfig,
    columns: Columns,
    fact_cache: FactCache,
    parallel: Parallel,
    check: Callable[[Sequence[CheckedTable]], None],
) -> CheckedTable | None:
    """The checked table of a config; None where the data set was encoded before. Collective.

    One process of each node makes and checks it; the others read what that one wrote. So is the table
    of what is held out, where there is one.

    Args:
        columns: of the model's family.
        check: called with both tables by the process that made them.

    Raises:
        MetadataError, ParameterError: see `prepare_data`; and whatever `check` raises.
    """
    if config.dataset_metadata_path is None:
        return None
    with parallel.node_main_first():
        if not parallel.is_node_main:
            return read_checked(Path(config.output_path), PINNED)
        own = held_out_config(config)
        tables: list[CheckedTable] = []
        for each in [config] if own is None else [config, own]:
            with tqdm(desc="check files", unit="file", delay=2, disable=None) as bar:
                tables.append(prepare_data(each, columns, fact_cache, bar.update, pinned=True))
        check(tables)
        return tables[0]


def encoded_before(config: TrainingConfig) -> tuple[Manifest, Manifest | None]:
    """The manifest of a data set that was encoded before, and of what is held out where that has one of
    its own. Raises `StoreError`."""
    manifest = read_manifest(Path(config.dataset_base_path))
    return manifest, held_out_manifest(config, manifest)


def encoded_manifest(
    config: TrainingConfig,
    parallel: Parallel,
    models: Models,
    table: CheckedTable | None,
    fact_cache: FactCache,
    reporter: Reporter,
    stop_asked: Callable[[], bool],
) -> Manifest:
    """The manifest of a data set, with every sample of it in the store. Collective.

    Args:
        table: None where the data set was encoded before: `dataset_base_path` names it.

    Raises:
        MetadataError: a file is no longer what was checked.
        StoreError: nothing is to be encoded, and the store lacks samples.
        Stopped: a signal came.
    """
    if table is None:
        manifest, held_out = encoded_before(config)
    else:
        own = held_out_config(config)
        held_out = None
        if own is not None:
            held_out = _encode(own, parallel, models, fact_cache, reporter, stop_asked)
        manifest = _encode(config, parallel, models, fact_cache, reporter, stop_asked)
        if own is None and parallel.is_node_main:
            forget_held_out(config)
    if parallel.is_main_process:
        for each in [manifest] if held_out is None else [manifest, held_out]:
            Store(Path(each.store)).add_user(each.folder)
    return manifest


def _encode(
    config: TrainingConfig,
    parallel: Parallel,
    models: Models,
    fact_cache: FactCache,
    reporter: Reporter,
    stop_asked: Callable[[], bool],
) -> Manifest:
    """The manifest of the run folder's checked table, after encoding what the store lacks of it."""
    output = Path(config.output_path)
    with parallel.node_main_first():
        table = read_checked(output, PINNED)
        if parallel.is_node_main:
            keys = Keys(models.resolved, fact_cache, models.dtype)
            rows = plan_sample_rows(config, models.resolved, keys, fact_cache)
            plan_samples(config, models.resolved, table, keys, rows)
        planned = read_manifest(output, PLANNED)
        if parallel.is_node_main:
            warning = count_long_captions(models.resolved, table, output, fact_cache).warning
            if warning is not None:
                reporter.warn(warning)
        sampled = planned_sample_rows(output)
    if parallel.is_main_process:  # so that a clean-up spares what an interrupted run encoded
        Store(Path(planned.store)).add_user(output)
    if config.trains_only:
        require_stored(planned)
    else:
        for each in [planned] if sampled is None else [planned, sampled.manifest]:
            require_planned_weights(models.resolved, each, fact_cache)

        def progress(stage: str, done: int, total: int) -> None:
            reporter.report(Encoding(stage, done, total))
            if stop_asked():
                raise Stopped

        with finishing():  # samples that were encoded, and are not yet in a shard
            report = encode_missing(
                config, models, planned, table, parallel, progress, reporter.warn
            )
            if sampled is not None:
                own = sample_rows_config(config)
                encode_missing(own, models, sampled.manifest, sampled.table, parallel, progress)
            reporter.report(Encoded(report.hits, report.misses))
        if stop_asked():
            raise Stopped
    parallel.wait_for_everyone()
    with parallel.node_main_first():
        if parallel.is_node_main:
            planned.publish()
        return read_manifest(output)


def require_stored(manifest: Manifest) -> None:
    """Refuse a manifest of which the store lacks samples. Raises `StoreError`."""
    missing = len(Store(Path(manifest.store)).missing(manifest.keys))
    if missing:
        wanted = manifest.keys.collect(engine="streaming").height
        raise lacking(missing, wanted, manifest.store)


@dataclass(frozen=True)
class Resolved:
    """Where the samples of a training lie: those that it is trained on, and those of its held-out loss;
    see `Parts`."""

    trained: Samples
    held_out: Samples | None
    compared: Samples | None


def resolved_samples(config: TrainingConfig, manifest: Manifest, parallel: Parallel) -> Resolved:
    """Where each sample of a manifest lies. Collective: one process of a node writes it, all map
    it.

    Raises:
        StoreError: the store lacks a sample.
        ParameterError, MetadataError: see `parts_of`.
    """
    folder = Path(config.output_path)
    with parallel.node_main_first():
        if parallel.is_node_main:
            forget_parts(config, folder)
            parts = parts_of(config, manifest, folder)
            resolve(parts.trained, folder)
            if parts.held_out is not None and parts.compared is not None:
                resolve(parts.held_out, folder, _HELD_OUT)
                resolve(parts.compared, folder, _COMPARED)
        more = (_HELD_OUT, _COMPARED) if config.holds_out else ()
        held_out, compared = [Samples(folder, name) for name in more] or [None, None]
        return Resolved(Samples(folder), held_out, compared)
