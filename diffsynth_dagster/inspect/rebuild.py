"""Write the recipe that makes a weight file again: on a CPU, with the same bytes."""

import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from diffsynth_dagster import __version__
from diffsynth_dagster.config.entries import MODEL_FOLDERS
from diffsynth_dagster.config.parameters import TrainingConfig
from diffsynth_dagster.config.recipe import dump_config
from diffsynth_dagster.data.table.checked_table import FILE_NAME, PINNED
from diffsynth_dagster.errors import OutputError, ParameterError, UserError, WeightsError, printable
from diffsynth_dagster.facts import FACTS, FactCache, digest_file, fact_cache_of
from diffsynth_dagster.files import link_whole, write_text
from diffsynth_dagster.inspect.dataset import changed_files
from diffsynth_dagster.inspect.describe import first
from diffsynth_dagster.inspect.subject import CONFIG, Run, Subject
from diffsynth_dagster.inspect.tables import Tables, held_out_tables, tables_of
from diffsynth_dagster.run.start import STARTS, config_digest
from diffsynth_dagster.weights.hub import ModelHub
from diffsynth_dagster.weights.identify import find_model
from diffsynth_dagster.weights.models import component_digest
from diffsynth_dagster.weights.resolved import ResolvedModel

# Paths that are not part of the identity (at most the content behind them is): made absolute.
_PATHS = ("dataset_base_path", "dataset_metadata_path", "validation_metadata_path", "cache_path")
# Parameter → ending of the copy of its table that is written beside the recipe.
_COPIES = {"dataset_metadata_path": "metadata", "validation_metadata_path": "held_out"}
_SHOWN = 20
_FILES = ("sample_table", "lora_checkpoint", "resume_from_checkpoint", "preset_lora_path")


def write_recipe(subject: Subject, out: Path) -> list[str]:
    """Write the recipe of the training that wrote a file, and copies of the tables it used.

    Returns:
        Lines that say what was written, what the recipe needs, and what has changed since.

    Raises:
        OutputError: a file to write exists already, or cannot be written.
        WeightsError, ParameterError, StoreError, MetadataError: the file, its run folder or its
            tables are not known; see `Subject.require_run` and `tables_of`.
    """
    run, output = subject.require_run(), out.absolute().with_suffix("")
    if out.suffix not in (".yaml", ".yml"):
        raise OutputError("a recipe ends with .yaml", where=str(out), do="give it that ending")
    config = _config_of(run)
    tables = tables_of(run)
    held_out = held_out_tables(run, tables)
    used = {"dataset_metadata_path": tables}
    if held_out is not None:
        used["validation_metadata_path"] = held_out
    values = {**_absolute(config, run.started_in), "output_path": str(output)}
    places: dict[str, Path] = {}
    if run.encoded_in.resolve() == run.whole_folder.resolve():
        # The recipe reads copies of the checked tables: the user's tables may have changed since.
        places = {n: out.absolute().with_suffix(f".{_COPIES[n]}.parquet") for n in used}
        values |= {name: str(place) for name, place in places.items()}
        data = tables.checked.data["dataset_base_path"]
        # Without `:data_process` or `:train`, the recipe encodes and trains in one go.
        values |= {"dataset_base_path": data, "task": config.task.split(":")[0]}
    _require_free(out, output, *places.values())
    recipe = TrainingConfig.model_validate(values)
    assert config_digest(recipe) == run.record.config_digest, "paths count by content"
    for name, place in places.items():
        pinned = used[name].folder / PINNED
        link_whole(pinned if pinned.is_file() else used[name].folder / FILE_NAME, place)
    write_text(out, dump_config(recipe))
    beside = ", with the tables that the training was made with beside it" if places else ""
    return [
        f"wrote {out.absolute()}{beside}",
        *_makes(subject, recipe, out.absolute()),
        *_base_lines(run, recipe),
        *_warnings(run, recipe, [*used.values()]),
    ]


def _config_of(run: Run) -> TrainingConfig:
    """The parameters of a training. Raises `ParameterError`: its config.yaml is missing, or belongs
    to another training."""
    config = run.config
    if config is None or config_digest(config) != run.record.config_digest:
        what = "is not there" if config is None else "is not that of the training"
        raise ParameterError(
            f"the {CONFIG} of the run folder {what}",
            where=str(run.folder / CONFIG),
            do="put it back; run.json names the parameters by which the result is told, and no paths",
        )
    return config


def _require_free(*places: Path) -> None:
    """Refuse to overwrite anything. Raises `OutputError`."""
    for place in places:
        # lexists: a dangling link counts too.
        if os.path.lexists(place):
            raise OutputError(
                "the recipe, or what it would write, is there already",
                where=str(place.absolute()),
                do="remove it, or give another OUT.yaml",
            )


def _absolute(config: TrainingConfig, base: Path) -> dict[str, Any]:
    """The parameters of a config with absolute paths, so that the recipe works from any folder.

    Only for parameters whose path is not part of the identity: other ones would change the header
    of the file, and so its bytes.
    """
    values: dict[str, Any] = config.model_dump(mode="json")

    def absolute(path: str) -> str:
        return os.path.join(base, path)

    for name in (*_PATHS, *_FILES):
        if values[name]:
            values[name] = absolute(values[name])
    for name in MODEL_FOLDERS:
        # With a colon it is a model of a hub, unless a folder has that name.
        if values[name] is not None and (":" not in values[name] or (base / values[name]).exists()):
            values[name] = absolute(values[name])
    hub = config.model_id_with_origin_paths
    for name in ("model_paths", "fp8_models"):
        values[name] = [_absolute_entry(item, absolute, hub) for item in values[name]]
    return values


def _absolute_entry(item: Any, absolute: Callable[[str], str], hub: tuple[str, ...]) -> Any:
    """An entry of a model list with absolute paths. A model of the hub is returned as it is."""
    if isinstance(item, list):
        return [absolute(path) for path in item]
    return item if item in hub else absolute(item)


def _makes(subject: Subject, recipe: TrainingConfig, out: Path) -> list[str]:
    """The command that makes the file again, the path it writes, and what it needs."""
    run = subject.require_run()
    name = subject.checkpoint or subject.path.name
    if "checkpoint" in subject.said and subject.path.absolute().is_relative_to(run.folder):
        name = str(subject.path.absolute().relative_to(run.folder))
    # As many processes as before: the batch of a step depends on them.
    count = len(run.record.devices)
    start = "python" if count < 2 else f"accelerate launch --num_processes {count}"
    data = (
        f"  the data set that is encoded in {recipe.dataset_base_path}"
        if recipe.reads_encoded
        else f"  the files of the data set in {recipe.dataset_base_path}, or the store "
        f"{recipe.cache_path} that has them encoded"
    )
    lines = [
        f"`{start} -m diffsynth_dagster.train --recipe {out}` makes the file again, as "
        f"{Path(recipe.output_path) / name}; it needs, unchanged:",
        data,
    ]
    if recipe.model_id_with_origin_paths:
        lines.append(
            f"  the models of the hub, in {ModelHub.from_environment().base_path.absolute()}"
        )
    if recipe.sample_table is not None:
        lines.append(f"  the table of samples {recipe.sample_table}")
    return [printable(line) for line in lines]


def _warnings(run: Run, recipe: TrainingConfig, tables: Sequence[Tables]) -> list[str]:
    """A line for everything that has changed and may lead to other bytes."""
    warnings: list[str] = []
    for part in tables:
        changed = changed_files(part.checked.accepted.collect(engine="streaming"))
        warnings += first([f"row {row}: {what}" for row, what in changed], _SHOWN)
    record = run.record
    libraries = {n: (then, _version(n)) for n, then in record.libraries.items()}
    programs = {"diffsynth-dagster": (record.version, __version__), **libraries}
    warnings += [
        f"{n} was {then}, and is {now}" for n, (then, now) in programs.items() if then != now
    ]
    # GPUs do not promise to compute the same bits again.
    if set(record.devices) - {"cpu"}:
        devices = ", ".join(dict.fromkeys(record.devices))
        warnings.append(f"it was trained on {devices}: other devices give other bytes")
    if recipe.mixed_precision is None and record.mixed_precision != "no":
        warnings.append(
            f"it was trained in {record.mixed_precision}, which the recipe leaves to the device"
        )
    return [printable(f"warning: {text}") for text in warnings]


def _version(name: str) -> str:
    """The version of an installed package, for a message."""
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def _base_lines(run: Run, recipe: TrainingConfig) -> list[str]:
    """A line for each base model: its digest, or a warning if its files have changed."""
    # Only looks: a model that is not there is reported, not downloaded.
    hub = ModelHub(ModelHub.from_environment().base_path, skip_download=True)
    base = run.record.base
    try:
        found = find_model(recipe, hub)
    except UserError as error:
        why = f"warning: the base weights cannot be looked at: {error.what} ({error.where})"
        return [*(f"  {name} {digest}" for name, digest in base.items()), printable(why)]
    if recipe.reads_encoded:  # the models that encoded the samples are not needed again
        needed = {*found.components, *found.tokenizers, *STARTS}
        base = {name: digest for name, digest in base.items() if name in needed}
    with tempfile.TemporaryDirectory() as folder:
        # If the cache is gone, digests are computed again and not kept.
        known = (Path(recipe.cache_path) / FACTS).is_file()
        with fact_cache_of(recipe.cache_path if known else folder) as cache:
            now = _digests(base, recipe, found, cache)
    return [
        printable(f"  {name} {digest}" if now[name] == digest else f"warning: {name}: {now[name]}")
        for name, digest in base.items()
    ]


def _digests(
    names: Mapping[str, str], recipe: TrainingConfig, model: ResolvedModel, cache: FactCache
) -> dict[str, str]:
    """The present digest of each base model, or what is wrong with it.

    Args:
        names: component, tokenizer, or parameter in `STARTS` → the digest in the record.
    """
    digests: dict[str, str] = {}
    for name, digest in names.items():
        try:
            if name in STARTS:
                now = digest_file(Path(getattr(recipe, name)))
            elif name not in {*model.components, *model.tokenizers}:
                digests[name] = "it is not in the model list"
                continue
            else:
                now = component_digest(model, name, cache)
        except WeightsError as error:
            digests[name] = f"{error.what} ({error.where})"
        except OSError as error:
            digests[name] = f"it cannot be read: {error}"
        else:
            same = now == digest
            digests[name] = now if same else f"its files have the digest {now}, and had {digest}"
    return digests
