"""Split training: the config of each half, and the parameters that the second takes from the first.

Dagster's process imports this module, so it must not import torch or the libraries built on it.
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
    """The config with the parameters that an earlier step has fixed, where it leaves them out.

    The second half of split training takes them from the encoded data set. A config that names a
    checked table takes them from that table.

    Raises:
        StoreError: there is no encoded data set.
        ParameterError: the config gives another value than the earlier step had.
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
    """The parameters that a table was checked with; those added to this program since were off."""
    return {**off_values("rows"), **table.parameters}


def _encoded_with(manifest: Manifest) -> dict[str, Any]:
    """The parameters that a data set was encoded with; those added since were off."""
    return {**off_values("rows", "latents"), **manifest.parameters}


def first_half(config: TrainingConfig) -> TrainingConfig:
    """The config with which the checked table in the run folder is encoded.

    Raises:
        MetadataError: the run folder has no checked table.
        ParameterError: its table is of another data set, or was checked with other parameters.
    """
    config = with_settled(config)
    folder = Path(config.output_path)
    checked = read_checked(folder)
    # The recipe may have been edited since the table was checked.
    given = {**named_data(config), **settled_by_checking(config)}
    settled = {**checked.data, **_checked_with(checked)}
    where, do = str(folder / CHECKED_TABLE), "check it again: materialize the metadata first"
    require_same(given, settled, "the table was checked", where, do)
    # With a checked table as its table, encoding does not check the rows a second time.
    tables = {"dataset_metadata_path": str(folder / CHECKED_TABLE)}
    held_out = held_out_config(config)
    if held_out is not None:
        path = Path(held_out.output_path) / CHECKED_TABLE
        checked = read_checked(path.parent)
        require_same(named_data(held_out), checked.data, "the table was checked", str(path), do)
        tables["validation_metadata_path"] = str(path)
    task = config.task.split(":")[0] + ":data_process"
    return config.model_copy(update={"task": task, **tables})


def second_half(config: TrainingConfig) -> TrainingConfig:
    """The config with which the encoded data set in the run folder is trained on. If the config
    names an encoded data set itself, only the task changes.

    Raises:
        StoreError: the run folder holds no encoded data set.
        ParameterError: its data set is another one, or was encoded with other parameters.
    """
    task = config.task.split(":")[0] + ":train"
    # Without a table, `dataset_base_path` names an encoded data set.
    if config.dataset_metadata_path is None:
        return config.model_copy(update={"task": task})
    config = with_settled(config)
    manifest = read_manifest(Path(config.output_path))
    given = {**named_data(config), **settled_by_encoding(config)}
    settled = {**manifest.data, **_encoded_with(manifest)}
    do = "encode it again: materialize the latents first"
    require_same(given, settled, "the data set was encoded", str(manifest.path), do)
    held_out_manifest(config, manifest)  # only for its checks
    encoded = {"dataset_metadata_path": None, "dataset_base_path": config.output_path}
    return config.model_copy(update={"task": task, **encoded})
