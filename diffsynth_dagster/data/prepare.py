"""Make the data set, if the recipe says how, and check all of it."""

from pathlib import Path

from diffsynth_dagster.config.parameters import TrainingConfig
from diffsynth_dagster.data.columns import Columns
from diffsynth_dagster.data.table.check import Progress, Validated, validate, write_validated
from diffsynth_dagster.dotted import import_dotted
from diffsynth_dagster.facts import FactBook


def prepare_data(
    config: TrainingConfig, columns: Columns, book: FactBook, progress: Progress = lambda n: None
) -> Validated:
    """Call `customized_dataset`, check every row, and write the result into the run folder.

    Rejected rows are not refused here: see `require_accepted`.

    Raises:
        MetadataError, ParameterError: see `validate`.
        OutputError: the run folder cannot be written.
    """
    if config.customized_dataset is not None:
        make = import_dotted(config.customized_dataset, "customized_dataset")
        make(Path(config.dataset_base_path))
    validated = validate(config, columns, book, progress)
    write_validated(validated, Path(config.output_path))
    return validated
