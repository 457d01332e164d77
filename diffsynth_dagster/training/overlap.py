"""Refuses a training whose files would take the place of what it reads.

This looks at paths, and at the little that a run folder holds already: it is done before anything is
written, and for `--dry_run`. Symbolic links are followed.
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
"""Tables of a run folder that it may be given again, as they were checked there."""
_FILES = (
    *_OWN_TABLES,
    *("lora_checkpoint", "preset_lora_path", "resume_from_checkpoint"),
)
"""Parameters that name a file that is read."""


def refuse_overlap(config: TrainingConfig) -> None:
    """Refuse a config by which an input would be replaced, moved or removed, or the run folder lie in a
    store.

    Raises:
        ParameterError: it names the file or folder, and both parameters.
        MetadataError: a checked table that the config names is damaged.
    """
    output, data = Path(config.output_path), Path(config.dataset_base_path)
    cache = Path(config.cache_path)
    for store in (cache, *_stores_above(output)):
        if _place_in(output, store) is not None:
            what = "the run folder lies in a store of encoded samples"
            raise _refused(what, config, "cache_path", store)
    if not config.reads_encoded and _place_in(data, output) == ".":
        what = "the run folder is that of the data set, whose files would be replaced"
        raise _refused(what, config, "dataset_base_path", data)
    for parameter, folder in (("cache_path", cache), ("dataset_base_path", data)):
        place = _place_in(folder, output)
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
    """Refuse a recipe that the `config.yaml` of the run folder would be written over. One that a training
    wrote there may be given again: it has no comments and no keys that are lost.

    Raises:
        ParameterError: it is one.
    """
    if "config.yaml" not in _names_in(recipe, Path(config.output_path)):
        return
    values, _ = read_values(recipe)
    if yaml.safe_dump(values, sort_keys=False) != recipe.read_text(encoding="utf-8"):
        raise _replaced("config.yaml", config, "recipe", recipe)


def refuse_replaced_rows(config: TrainingConfig, tables: Sequence[CheckedTable]) -> None:
    """Refuse rows with files that would be replaced, moved or removed: samples of an earlier training in
    the same run folder.

    Raises:
        ParameterError: it names a file.
    """
    start = os.path.join(os.path.realpath(config.output_path), "")
    is_written = _writes(config)
    for table in tables:
        for column, kind in table.rows.collect_schema().items():
            if not column.endswith(":path"):
                continue
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
    """Parameter and file, or folder, of all that is read beside the rows' files."""
    for parameter in _FILES:
        if getattr(config, parameter) is not None:
            yield parameter, Path(getattr(config, parameter))
    if config.sample_table is not None:
        yield "sample_prompts", Path(config.sample_table)
    hub = ModelHub(ModelHub.from_environment().base_path, skip_download=True)

    def folder(entry: ModelEntry) -> list[Path]:
        return [hub.folder(entry)]

    found = [(hub.files, model_entries(config)), (folder, folder_entries(config))]
    for look, entries in found:
        for entry in entries:
            paths = [Path(text) for text in entry.paths]
            with suppress(WeightsError):  # not there yet
                paths += look(entry)
            for path in dict.fromkeys(paths):
                yield entry.parameter, path


def _writes(config: TrainingConfig) -> Callable[[str], bool]:
    """Tells whether a config replaces, moves or removes a file, by its path from the run folder."""
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
        # How many steps an epoch has, and which are left, depends on the number of samples.
        if kind == "epoch":
            return not by_steps and number < (config.max_train_steps or config.num_epochs)
        if kind == "best-step":
            return config.keep_best
        return by_steps or stops_early or number == config.max_train_steps

    return writes


def _names_in(path: Path, folder: Path) -> list[str]:
    """What a file is called in a folder: as it is named, and what a link leads to."""
    named = Path(os.path.realpath(path.parent), path.name)
    places = (_place(named, folder), _place(Path(os.path.realpath(path)), folder))
    return [place for place in places if place is not None]


def _place_in(path: Path, folder: Path) -> str | None:
    """The way from a folder to what lies in it: "." where they are one; None where it lies elsewhere."""
    return _place(Path(os.path.realpath(path)), folder)


def _place(path: Path, folder: Path) -> str | None:
    home = os.path.realpath(folder)
    for above in (path, *path.parents):
        if _is_same(str(above), home):
            return path.relative_to(above).as_posix()
    return None


def _is_same(path: str, other: str) -> bool:
    """Whether two paths are of one folder: some file systems read small letters as large ones."""
    if path == other:
        return True
    try:
        return os.path.samefile(path, other)
    except OSError:  # one is not there
        return False


def _stores_above(folder: Path) -> Iterator[Path]:
    """The stores that a folder lies in."""
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
