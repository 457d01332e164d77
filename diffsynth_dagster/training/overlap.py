"""Refuses a training that would write over its own inputs.

Only paths and the names in an existing run folder are looked at, so this is checked before anything
is written, and in a dry run. Symbolic links are followed.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import polars as pl
import yaml

from diffsynth_dagster.config.entries import ModelEntry, folder_entries, model_entries
from diffsynth_dagster.config.parameters import TrainingConfig
from diffsynth_dagster.config.recipe import read_values
from diffsynth_dagster.data.table.checked_table import FILE_NAME as CHECKED
from diffsynth_dagster.data.table.checked_table import find_checked
from diffsynth_dagster.data.table.validate import CheckedTable
from diffsynth_dagster.errors import ParameterError, WeightsError
from diffsynth_dagster.own_names import CHECKPOINT, OWN, is_older, is_own, is_promoted, is_trained
from diffsynth_dagster.run.earlier import earlier_files
from diffsynth_dagster.weights.hub import ModelHub

_OWN_TABLES = {
    "dataset_metadata_path": CHECKED,
    "validation_metadata_path": f"held_out/{CHECKED}",
}
"""Parameter → the table of the run folder that it may name. The table is then taken as checked."""
_FILES = (
    *_OWN_TABLES,
    *("lora_checkpoint", "preset_lora_path", "resume_from_checkpoint"),
)
"""Parameters that name an input file."""


def refuse_overlap(config: TrainingConfig) -> None:
    """Refuse a config if an input would be replaced, moved or removed, or if the run folder lies in
    a store of encoded samples.

    Raises:
        ParameterError: it names the file or folder, and both parameters.
        MetadataError: a checked table that the config names is damaged.
    """
    output, data = Path(config.output_path), Path(config.dataset_base_path)
    cache = Path(config.cache_path)
    # A store may be deleted and encoded again. A run folder in it would be lost with it.
    for store in (cache, *_stores_above(output)):
        if _place_in(output, store) is not None:
            what = "the run folder lies in a store of encoded samples"
            raise _refused(what, config, "cache_path", store)
    if not config.reads_encoded and _place_in(data, output) == ".":
        what = "the run folder is that of the data set, whose files would be replaced"
        raise _refused(what, config, "dataset_base_path", data)
    for parameter, folder in (("cache_path", cache), ("dataset_base_path", data)):
        place = _place_in(folder, output)
        # Such a folder belongs to the run: any file in it is replaced.
        if place is not None and is_own(f"{place}/any"):
            what = f"'{place}' of the run folder is replaced with all that is in it"
            raise _refused(what, config, parameter, folder)
    is_written = _writes(config)
    for parameter, path in _inputs(config):
        for name in _names_in(path, output):
            is_given_again = _OWN_TABLES.get(parameter) == name and find_checked(path) is not None
            if is_written(name) and not is_given_again:
                raise _replaced(name, config, parameter, path)


def refuse_own_recipe(config: TrainingConfig, recipe: Path) -> None:
    """Refuse a recipe that is the run folder's own `config.yaml`, which is written anew. If a
    training wrote it, it may be given again: it has no comments that would be lost.

    Raises:
        ParameterError: a person wrote or edited it.
    """
    if "config.yaml" not in _names_in(recipe, Path(config.output_path)):
        return
    values, _ = read_values(recipe)
    # A file that a training wrote is equal to the dump of its values.
    if yaml.safe_dump(values, sort_keys=False) != recipe.read_text(encoding="utf-8"):
        raise _replaced("config.yaml", config, "recipe", recipe)


def refuse_replaced_rows(config: TrainingConfig, tables: Sequence[CheckedTable]) -> None:
    """Refuse rows whose files would be replaced, moved or removed: samples of an earlier training
    in the same run folder.

    Raises:
        ParameterError: there is such a file; the message names it.
    """
    start = os.path.join(os.path.realpath(config.output_path), "")
    is_written = _writes(config)
    for table in tables:
        for column, kind in table.rows.collect_schema().items():
            if not column.endswith(":path"):
                continue
            # Filtered in Polars: only names in the run folder become Python objects.
            path = pl.col(column)
            names = table.rows.select((path.explode() if kind == pl.List else path).alias("name"))
            names = names.filter(pl.col("name").str.starts_with(start))
            names = names.select(pl.col("name").str.strip_prefix(start))
            names = names.filter(pl.col("name").str.contains(OWN)).unique()
            for name in names.collect(engine="streaming")["name"].sort():
                if is_written(name):
                    file_column = column.removesuffix(":path")
                    raise _replaced(name, config, file_column, Path(start, name))


def _inputs(config: TrainingConfig) -> Iterator[tuple[str, Path]]:
    """Parameter and path of each input file or folder, except for the files of the rows."""
    for parameter in _FILES:
        if getattr(config, parameter) is not None:
            yield parameter, Path(getattr(config, parameter))
    if config.sample_table is not None:
        yield "sample_table", Path(config.sample_table)
    # Where the files would be, without downloading them.
    hub = ModelHub(ModelHub.from_environment().base_path, skip_download=True)

    def folder(entry: ModelEntry) -> list[Path]:
        return [hub.folder(entry)]

    for look, entries in ((hub.files, model_entries(config)), (folder, folder_entries(config))):
        for entry in entries:
            paths = [Path(text) for text in entry.paths]
            with suppress(WeightsError):  # not downloaded yet
                paths += look(entry)
            for path in dict.fromkeys(paths):
                yield entry.parameter, path


def _writes(config: TrainingConfig) -> Callable[[str], bool]:
    """Returns a function that says whether the config replaces, moves or removes a file, given its
    path relative to the run folder."""
    # Encoding leaves alone what trainings wrote, and older and promoted files.
    if config.encodes_only:
        return lambda name: (
            is_own(name) and not (is_trained(name) or is_older(name) or is_promoted(name))
        )
    moved = earlier_files(Path(config.output_path))
    by_steps = config.save_steps is not None
    stops_early = config.early_stopping_patience is not None

    def writes(name: str) -> bool:
        if is_older(name):
            return config.runs_keep is not None
        if is_promoted(name):
            return False
        checkpoint = CHECKPOINT.fullmatch(name)
        if checkpoint is None or name in moved:
            return is_own(name)
        kind, number = checkpoint["kind"], int(checkpoint["number"])
        # The number of samples is unknown, so the steps of an epoch are too: refuse any name that
        # could be written.
        # Checkpoints are named by epochs, or by steps with `save_steps`.
        if kind == "epoch":
            return not by_steps and number < (config.max_train_steps or config.num_epochs)
        if kind == "best-step":
            return config.keep_best
        return by_steps or stops_early or number == config.max_train_steps

    return writes


def _names_in(path: Path, folder: Path) -> list[str]:
    """The paths of a file relative to a folder: under its own name, and under the name that a link
    leads to. Empty if it is not in the folder."""
    # Links of folders are resolved, but not a link in place of the file.
    named = Path(os.path.realpath(path.parent), path.name)
    places = (_place(named, folder), _place(Path(os.path.realpath(path)), folder))
    return [place for place in places if place is not None]


def _place_in(path: Path, folder: Path) -> str | None:
    """A path relative to a folder: "." for the folder itself, None outside it."""
    return _place(Path(os.path.realpath(path)), folder)


def _place(path: Path, folder: Path) -> str | None:
    """As `_place_in`, for a path whose links are resolved already."""
    home = os.path.realpath(folder)
    for above in (path, *path.parents):
        if _is_same(str(above), home):
            return path.relative_to(above).as_posix()
    return None


def _is_same(path: str, other: str) -> bool:
    """Whether two paths are the same folder. On some file systems, capital letters do not count."""
    if path == other:
        return True
    try:
        return os.path.samefile(path, other)
    except OSError:  # one does not exist
        return False


def _stores_above(folder: Path) -> Iterator[Path]:
    """The stores that contain a folder."""
    place = Path(os.path.realpath(folder))
    for above in (place, *place.parents):
        if os.path.isdir(above / "index") and os.path.isdir(above / "shards"):
            yield above


def _replaced(name: str, config: TrainingConfig, parameter: str, path: Path) -> ParameterError:
    what = (
        "what is read would be replaced, moved or removed by what is written: "
        f"'{name}' of the run folder"
    )
    return _refused(what, config, parameter, path)


def _refused(what: str, config: TrainingConfig, parameter: str, path: Path) -> ParameterError:
    return ParameterError(
        what,
        where=f"{parameter} = {path}, output_path = {config.output_path}",
        do="give another output_path, a folder for this training alone",
    )
