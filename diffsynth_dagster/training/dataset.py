"""The data set of a training, from its table to the manifest whose every sample is encoded."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffsynth_dagster.config.parameters import TrainingConfig
from diffsynth_dagster.errors import Stopped

if TYPE_CHECKING:
    from diffsynth_dagster.cache.store import Store
    from diffsynth_dagster.training.parallel import Parallel
    from diffsynth_dagster.training.stop import StopSignal


def open_store(config: TrainingConfig) -> "Store":
    """The store that a config reads: its own, or that of the encoded data set it names."""
    from diffsynth_dagster.cache.manifest import read_manifest
    from diffsynth_dagster.cache.store import Store

    if config.dataset_metadata_path is not None:
        return Store(Path(config.cache_path))
    return Store(Path(read_manifest(Path(config.dataset_base_path)).store))


def prepare(config: TrainingConfig, book: Any, main: bool) -> Any:
    """The checked rows of the data set. Raises `MetadataError` when too many are rejected.

    The main process makes, checks and writes; the others then read what it found out.
    """
    from tqdm import tqdm

    from diffsynth_dagster.data.prepare import prepare_data
    from diffsynth_dagster.data.table.check import require_accepted, validate
    from diffsynth_dagster.weights.identify import guess_family

    if not main:
        looked_up = config.model_copy(update={"verify_content": False})
        return validate(looked_up, guess_family(config).columns, book)
    with tqdm(desc="check files", unit="file", delay=2) as bar:
        validated = prepare_data(config, guess_family(config).columns, book, bar.update)
    require_accepted(validated, config.max_rejected_fraction)
    return validated


def encode(
    config: TrainingConfig,
    parallel: "Parallel",
    models: Any,
    validated: Any,
    book: Any,
    reporter: Any,
    stop_asked: "StopSignal",
) -> Any:
    """The manifest of the data set, with every key of it in the store."""
    from diffsynth_dagster.cache.encode import Keys, encode_missing, plan_samples
    from diffsynth_dagster.cache.manifest import read_manifest
    from diffsynth_dagster.cache.split import require_encoded_for
    from diffsynth_dagster.cache.store import Store
    from diffsynth_dagster.errors import StoreError

    if validated is None:
        manifest = read_manifest(Path(config.dataset_base_path))
        require_encoded_for(config, models.found, manifest, book)
    else:
        keys = Keys(models.found, book, models.dtype)
        manifest = plan_samples(config, models.found, validated, keys)
        if not config.trains_only:

            def progress(stage: str, done: int, total: int) -> None:
                reporter.encoding(stage, done, total)
                if stop_asked():
                    raise Stopped

            report = encode_missing(config, models, manifest, validated, parallel, progress)
            reporter.encoded(report)
    missing = Store(Path(manifest.store)).missing(manifest.keys)
    if missing:
        raise StoreError(
            f"the store lacks {len(missing)} of {len(manifest.keys)} encoded inputs",
            where=manifest.store,
            do="run the task with :data_process and the same parameters first",
        )
    if parallel.is_main_process:
        folder = Path(config.dataset_base_path if validated is None else config.output_path)
        if validated is not None:
            manifest.write(folder)
        Store(Path(manifest.store)).add_user(folder)
    parallel.wait_for_everyone()
    return manifest
