"""Make the data set if the recipe says how and check it, or use a table that is checked already."""

from dataclasses import replace
from pathlib import Path

from diffsynth_dagster.config.inherited import named_data
from diffsynth_dagster.config.parameters import TrainingConfig
from diffsynth_dagster.data.columns import Columns
from diffsynth_dagster.data.media.budget import DECODING
from diffsynth_dagster.data.table.checked_table import (
    FILE_NAME,
    PINNED,
    find_checked,
    pin,
    read_checked,
    write_checked,
)
from diffsynth_dagster.data.table.read import require_file, require_folder
from diffsynth_dagster.data.table.validate import CheckedTable, validate
from diffsynth_dagster.dotted import import_function
from diffsynth_dagster.errors import ParameterError
from diffsynth_dagster.facts import FactCache, Progress


def require_named(config: TrainingConfig) -> None:
    """Refuse a table or a data folder that does not exist, before anything is written.

    Raises:
        MetadataError: it does not exist, and no `customized_dataset` makes it.
    """
    if config.dataset_metadata_path is None or config.customized_dataset is not None:
        return
    table = Path(config.dataset_metadata_path)
    if table != Path(config.dataset_base_path) and not table.is_dir():
        require_file(table)
    if find_checked(table) is None:  # a checked table holds absolute paths: it needs no folder
        require_folder(Path(config.dataset_base_path))


def make_data(config: TrainingConfig) -> None:
    """Call `customized_dataset`, if there is one and no checked table is named.

    Raises:
        ParameterError: see `import_function`. What the user's function raises is passed on.
    """
    assert config.dataset_metadata_path is not None
    if config.customized_dataset is None or find_checked(Path(config.dataset_metadata_path)):
        return
    make = import_function(config.customized_dataset, "customized_dataset", "dataset_base_path")
    make(Path(config.dataset_base_path))


def check_data(
    config: TrainingConfig,
    columns: Columns,
    fact_cache: FactCache,
    progress: Progress = lambda n: None,
    signed: bool = False,
) -> CheckedTable:
    """The same as `prepare_data`, but without making the data set or writing the table.

    Raises:
        MetadataError, ParameterError: see `prepare_data`.
    """
    assert config.dataset_metadata_path is not None
    DECODING.megapixels = config.decode_megapixels
    checked = find_checked(Path(config.dataset_metadata_path))
    if checked is None:
        return validate(config, columns, fact_cache, progress, signed)
    _require_fit(config, columns, checked)
    return checked


def prepare_data(
    config: TrainingConfig,
    columns: Columns,
    fact_cache: FactCache,
    progress: Progress = lambda n: None,
    pinned: bool = False,
    made: bool = False,
    signed: bool = False,
) -> CheckedTable:
    """Return the checked table of a config, and write it into the run folder.

    If `dataset_metadata_path` names a checked table, it is used as it is. Otherwise
    `customized_dataset` is called, and every row is checked. Rejected rows raise no error here: see
    `CheckedTable.require_accepted`.

    Args:
        pinned: whether the caller owns the run folder and goes on with this table, even if others
            check the data set again meanwhile: see `table.checked_table.PINNED`.
        made: whether `make_data` was already called.
        signed: whether the rows need signatures, by which near copies are found: see `FileCheck`.

    Raises:
        MetadataError, ParameterError: see `validate`; or the checked table is for other columns or
            sizes.
        OutputError: the run folder cannot be written.
    """
    assert config.dataset_metadata_path is not None
    DECODING.megapixels = config.decode_megapixels
    named, own = Path(config.dataset_metadata_path), Path(config.output_path) / FILE_NAME
    is_own = own.exists() and named.exists() and named.samefile(own)
    checked = find_checked(named)
    if checked is not None:
        _require_fit(config, columns, checked)
        if not is_own:  # a table of another run folder: this run gets a copy
            return write_checked(replace(checked, data=named_data(config)), own.parent, pinned)
        if not pinned:
            return checked
        # Read again after pinning: someone may have replaced the table in between.
        pin(own.parent)
        return read_checked(own.parent, PINNED)
    assert not is_own, "the data set's own table is not replaced: see `training.overlap`"
    if not made:
        make_data(config)
    checked = validate(config, columns, fact_cache, progress, signed)
    return write_checked(checked, own.parent, pinned)


def _require_fit(config: TrainingConfig, columns: Columns, checked: CheckedTable) -> None:
    """Refuse a checked table of other columns or sizes. Raises `ParameterError`."""
    if checked.read_as != columns.described:
        raise ParameterError(
            f"the table was checked for other columns or sizes than {columns.reader} reads here",
            where=f"dataset_metadata_path = {config.dataset_metadata_path}",
            do="check the data set again: name the original table, or materialize the metadata",
        )
