"""Make the data set, if the recipe says how, and check all of it; or take what was checked."""

from pathlib import Path

from diffsynth_dagster.config.parameters import TrainingConfig
from diffsynth_dagster.data.columns import Columns
from diffsynth_dagster.data.table.check import CheckedTable, Progress, validate
from diffsynth_dagster.data.table.checked import FILE_NAME, find_checked, write_checked
from diffsynth_dagster.dotted import import_dotted
from diffsynth_dagster.errors import ParameterError
from diffsynth_dagster.facts import FactCache


def prepare_data(
    config: TrainingConfig,
    columns: Columns,
    fact_cache: FactCache,
    progress: Progress = lambda n: None,
) -> CheckedTable:
    """The checked table of a config.

    A checked table that `dataset_metadata_path` names is taken as it is. Otherwise
    `customized_dataset` is called, and every row is checked. The table lies in the run folder
    afterwards. Rejected rows are not refused here: see `CheckedTable.require_accepted`.

    Raises:
        MetadataError, ParameterError: see `validate`; or the checked table lacks a column.
        OutputError: the run folder cannot be written.
    """
    assert config.dataset_metadata_path is not None
    checked = find_checked(Path(config.dataset_metadata_path))
    if checked is not None:
        _require_fit(config, columns, checked)
        named, own = Path(config.dataset_metadata_path), Path(config.output_path) / FILE_NAME
        is_there = own.exists() and named.samefile(own)
        return checked if is_there else write_checked(checked, own.parent)
    if config.customized_dataset is not None:
        make = import_dotted(config.customized_dataset, "customized_dataset")
        make(Path(config.dataset_base_path))
    return write_checked(validate(config, columns, fact_cache, progress), Path(config.output_path))


def _require_fit(config: TrainingConfig, columns: Columns, checked: CheckedTable) -> None:
    """Refuse a checked table that lacks a column. Raises `ParameterError`."""
    have = checked.rows.collect_schema().names()
    lacks = [i.column for i in columns.inputs if i.column not in have]
    if lacks:
        raise ParameterError(
            f"the table was checked without what {columns.reader} reads: {', '.join(lacks)}",
            where=f"dataset_metadata_path = {config.dataset_metadata_path}",
            do="check the data set with these columns, or name the original table",
        )
