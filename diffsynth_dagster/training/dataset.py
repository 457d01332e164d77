"""The data set of a training: table → encoded samples → where each of them lies.

On the command line these are three calls in one process. In a Dagster job the metadata asset makes
the table, the latents asset encodes it, and the checkpoints asset starts from what was encoded.
"""

from collections.abc import Callable
from pathlib import Path

from tqdm import tqdm

from diffsynth_dagster.cache.encode import encode_missing
from diffsynth_dagster.cache.keys import Keys
from diffsynth_dagster.cache.manifest import PLANNED, Manifest, read_manifest
from diffsynth_dagster.cache.plan import plan_samples
from diffsynth_dagster.cache.resolve import Samples, lacking, resolve
from diffsynth_dagster.cache.split import require_encoded_for
from diffsynth_dagster.cache.store import Store
from diffsynth_dagster.config.parameters import TrainingConfig
from diffsynth_dagster.data.prepare import prepare_data
from diffsynth_dagster.data.table.check import CheckedTable
from diffsynth_dagster.data.table.checked import PINNED, read_checked
from diffsynth_dagster.errors import Stopped
from diffsynth_dagster.facts import FactCache
from diffsynth_dagster.training.parallel import Parallel
from diffsynth_dagster.training.reporting import Reporter
from diffsynth_dagster.weights.identify import guess_family
from diffsynth_dagster.weights.models import Models


def open_store(config: TrainingConfig) -> Store:
    """The store that a config reads: its own, or that of the encoded data set it names."""
    if config.dataset_metadata_path is not None:
        return Store(Path(config.cache_path))
    return Store(Path(read_manifest(Path(config.dataset_base_path)).store))


def checked_table(
    config: TrainingConfig, fact_cache: FactCache, parallel: Parallel
) -> CheckedTable | None:
    """The checked table of a config; None where the data set was encoded before. Collective.

    One process of each node makes and checks it; the others read what that one wrote.

    Raises:
        MetadataError: too many rows are rejected; or see `prepare_data`.
    """
    if config.dataset_metadata_path is None:
        return None
    with parallel.node_main_first():
        if not parallel.is_node_main:
            return read_checked(Path(config.output_path), PINNED)
        with tqdm(desc="check files", unit="file", delay=2, disable=None) as bar:
            columns = guess_family(config).columns
            table = prepare_data(config, columns, fact_cache, bar.update, pinned=True)
        table.require_accepted(config.max_rejected_fraction)
        return table


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
        ParameterError: it was encoded for another training: see `require_encoded_for`.
        Stopped: a signal came.
    """
    if table is None:
        manifest = read_manifest(Path(config.dataset_base_path))
        require_encoded_for(config, models.found, manifest, fact_cache)
        _require_stored(manifest)
    else:
        manifest = _encode(config, parallel, models, fact_cache, reporter, stop_asked)
    if parallel.is_main_process:
        Store(Path(manifest.store)).add_user(manifest.folder)
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
            keys = Keys(models.found, fact_cache, models.dtype)
            plan_samples(config, models.found, table, keys)
        planned = read_manifest(output, PLANNED)
    if parallel.is_main_process:  # so that a clean-up spares what an interrupted run encoded
        Store(Path(planned.store)).add_user(output)
    if config.trains_only:
        _require_stored(planned)
    else:

        def progress(stage: str, done: int, total: int) -> None:
            reporter.encoding(stage, done, total)
            if stop_asked():
                raise Stopped

        reporter.encoded(
            encode_missing(config, models, planned, table, parallel, progress, reporter.warned)
        )
    parallel.wait_for_everyone()
    with parallel.node_main_first():
        if parallel.is_node_main:
            planned.publish()
        return read_manifest(output)


def _require_stored(manifest: Manifest) -> None:
    """Refuse a manifest of which the store lacks samples. Raises `StoreError`."""
    missing = len(Store(Path(manifest.store)).missing(manifest.keys))
    if missing:
        wanted = manifest.keys.collect(engine="streaming").height
        raise lacking(missing, wanted, manifest.store)


def resolved_samples(config: TrainingConfig, manifest: Manifest, parallel: Parallel) -> Samples:
    """Where each sample of a manifest lies. Collective: one process of a node writes it, all map
    it.

    Raises:
        StoreError: the store lacks a sample.
    """
    folder = Path(config.output_path)
    with parallel.node_main_first():
        return resolve(manifest, folder) if parallel.is_node_main else Samples(folder)
