"""Split training: the config of each half, and what the second takes over from the first.

Nothing of torch's libraries is imported here: Dagster's process asks for the configs alone.
"""

from pathlib import Path
from typing import Any

from diffsynth_dagster.cache.held_out import held_out_config, held_out_manifest
from diffsynth_dagster.cache.manifest import Manifest, read_manifest
from diffsynth_dagster.config.affects import (
    off_values,
    settled_by_checking,
    settled_by_encoding,
)
from diffsynth_dagster.config.inherited import named_data, require_same, take_over
from diffsynth_dagster.config.parameters import TrainingConfig
from diffsynth_dagster.data.table.checked_table import FILE_NAME as CHECKED_TABLE
from diffsynth_dagster.data.table.checked_table import find_checked, read_checked
from diffsynth_dagster.data.table.validate import CheckedTable


def with_settled(config: TrainingConfig) -> TrainingConfig:
    """The config, with what earlier steps have settled in place of what it leaves out.

    The second half of split training takes over what the first encoded; a config that names a
    checked table takes over what that was checked with.

    Raises:
        StoreError: there is no encoded data set.
        ParameterError: the config asks for something else.
    """
    if config.reads_encoded:
        where = f"dataset_base_path = {config.dataset_base_path}"
        manifest = read_manifest(Path(config.dataset_base_path))
        taken = take_over(config, _encoded_with(manifest), "the data set was encoded", where)
        return taken.with_encoded({*manifest.stages, *manifest.outputs})
    if config.dataset_metadata_path is None:
        return config
    checked = find_checked(Path(config.dataset_metadata_path))
    if checked is None:
        return config
    where = f"dataset_metadata_path = {config.dataset_metadata_path}"
    return take_over(config, _checked_with(checked), "the table was checked", where)


def _checked_with(table: CheckedTable) -> dict[str, Any]:
    """What a table was checked with; parameters that are younger than it were off."""
    return {**off_values("rows"), **table.parameters}


def _encoded_with(manifest: Manifest) -> dict[str, Any]:
    """What a data set was encoded with; parameters that are younger than it were off."""
    return {**off_values("rows", "latents"), **manifest.parameters}


def first_half(config: TrainingConfig) -> TrainingConfig:
    """The config of encoding the checked table of its run folder.

    Raises:
        MetadataError: there is none.
        ParameterError: it is of another data set, or was checked with other parameters.
    """
    config = with_settled(config)
    folder = Path(config.output_path)
    checked = read_checked(folder)
    given = {**named_data(config), **settled_by_checking(config)}
    settled = {**checked.data, **_checked_with(checked)}
    where, do = str(folder / CHECKED_TABLE), "check it again: materialize the metadata first"
    require_same(given, settled, "the table was checked", where, do)
    tables = {"dataset_metadata_path": str(folder / CHECKED_TABLE)}
    own = held_out_config(config)
    if own is not None:
        path = Path(own.output_path) / CHECKED_TABLE
        checked = read_checked(path.parent)
        require_same(named_data(own), checked.data, "the table was checked", str(path), do)
        tables["validation_metadata_path"] = str(path)
    task = config.task.split(":")[0] + ":data_process"
    return config.model_copy(update={"task": task, **tables})


def second_half(config: TrainingConfig) -> TrainingConfig:
    """The config of training on what lies encoded in its run folder, or where it says.

    Raises:
        StoreError: the run folder holds no encoded data set.
        ParameterError: it is of another data set, or was encoded with other parameters.
    """
    task = config.task.split(":")[0] + ":train"
    if config.dataset_metadata_path is None:
        return config.model_copy(update={"task": task})
    config = with_settled(config)
    manifest = read_manifest(Path(config.output_path))
    given = {**named_data(config), **settled_by_encoding(config)}
    settled = {**manifest.data, **_encoded_with(manifest)}
    do = "encode it again: materialize the latents first"
    require_same(given, settled, "the data set was encoded", str(manifest.path), do)
    held_out_manifest(config, manifest)
    encoded = {"dataset_metadata_path": None, "dataset_base_path": config.output_path}
    return config.model_copy(update={"task": task, **encoded})
