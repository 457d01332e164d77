"""The data set of a training: table → encoded samples → where each of them lies.

On the command line these are three calls in one process. In a Dagster job the metadata asset makes
the table, the latents asset encodes it, and the checkpoints asset starts from what was encoded.
"""

from collections.abc import Callable
from pathlib import Path

from tqdm import tqdm

from diffsynth_dagster.cache.encode import EncodeReport, Ranks, encode_missing
from diffsynth_dagster.cache.keys import Keys
from diffsynth_dagster.cache.manifest import PLANNED, Manifest, read_manifest
from diffsynth_dagster.cache.plan import plan_samples
from diffsynth_dagster.cache.resolve import Samples, lacking, resolve
from diffsynth_dagster.cache.split import require_encoded_for
from diffsynth_dagster.cache.store import Store
from diffsynth_dagster.config.parameters import TrainingConfig
from diffsynth_dagster.data.prepare import prepare_data
from diffsynth_dagster.data.table.check import CheckedTable
from diffsynth_dagster.data.table.checked import find_checked, read_checked
from diffsynth_dagster.facts import FactBook
from diffsynth_dagster.weights.identify import guess_family
from diffsynth_dagster.weights.models import Models


def checked_table(config: TrainingConfig, book: FactBook, first: bool) -> CheckedTable:
    """The checked table of a config that names one or the other kind of metadata.

    Args:
        first: whether this process makes and checks it; the others read what that one wrote.

    Raises:
        MetadataError: too many rows are rejected; or see `prepare_data`.
    """
    if not first:
        named = find_checked(Path(str(config.dataset_metadata_path)))
        return named or read_checked(Path(config.output_path))
    with tqdm(desc="check files", unit="file", delay=2) as bar:
        table = prepare_data(config, guess_family(config).columns, book, bar.update)
    table.require_accepted(config.max_rejected_fraction)
    return table


def encoded_manifest(
    config: TrainingConfig,
    models: Models,
    table: CheckedTable,
    book: FactBook,
    ranks: Ranks,
    progress: Callable[[str, int, int], None],
) -> tuple[Manifest, EncodeReport]:
    """The manifest of a checked table, with every sample of it in the store.

    Raises:
        MetadataError: a file is no longer what was checked.
        StoreError: nothing is to be encoded, and the store lacks samples.
    """
    if ranks.process_index == 0:
        plan_samples(config, models.found, table, Keys(models.found, book, models.dtype))
    ranks.wait_for_everyone()
    manifest = read_manifest(Path(config.output_path), PLANNED)
    report = EncodeReport()
    if config.trains_only:
        _require_stored(manifest)
    else:
        report = encode_missing(config, models, manifest, table, ranks, progress)
    if ranks.process_index == 0:
        manifest.publish()
        Store(Path(manifest.store)).add_user(manifest.folder)
    ranks.wait_for_everyone()
    return read_manifest(Path(config.output_path)), report


def given_manifest(
    config: TrainingConfig, models: Models, book: FactBook, ranks: Ranks
) -> Manifest:
    """The manifest that the first half of split training wrote.

    Raises:
        StoreError: there is none, or the store lacks samples of it.
        ParameterError: it was encoded for another training: see `require_encoded_for`.
    """
    manifest = read_manifest(Path(config.dataset_base_path))
    require_encoded_for(config, models.found, manifest, book)
    _require_stored(manifest)
    if ranks.process_index == 0:
        Store(Path(manifest.store)).add_user(manifest.folder)
    ranks.wait_for_everyone()
    return manifest


def _require_stored(manifest: Manifest) -> None:
    """Refuse a manifest of which the store lacks samples. Raises `StoreError`."""
    missing = len(Store(Path(manifest.store)).missing(manifest.keys))
    if missing:
        wanted = manifest.keys.select("key").collect(engine="streaming").height
        raise lacking(missing, wanted, manifest.store)


def resolved_samples(config: TrainingConfig, manifest: Manifest, ranks: Ranks) -> Samples:
    """Where each sample of a manifest lies. Written by one process, mapped by all."""
    folder = Path(config.output_path)
    if ranks.process_index == 0:
        resolve(manifest, folder)
    ranks.wait_for_everyone()
    return Samples(folder)
