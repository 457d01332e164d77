"""Find out quickly whether a step would only repeat its last run: compare the states (size,
modification) of the files that it reads and of those it left.

This is the first question of every step, so nothing here imports torch, or reads a large file. If
the answer is no, the step itself finds out what has changed.
"""

import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import polars as pl
from blake3 import blake3

from diffsynth_dagster import __version__
from diffsynth_dagster.cache.held_out import FOLDER as HELD_OUT
from diffsynth_dagster.cache.held_out import held_out_config
from diffsynth_dagster.cache.layout import SAMPLES_FOLDER
from diffsynth_dagster.cache.manifest import FILE_NAME as MANIFEST
from diffsynth_dagster.cache.manifest import read_manifest
from diffsynth_dagster.config.affects import AFFECTS, Affects, names_that_affect
from diffsynth_dagster.config.entries import MODEL_FOLDERS, ModelEntry, named_entries
from diffsynth_dagster.config.parameters import MARKS, TrainingConfig
from diffsynth_dagster.data.listing import list_data
from diffsynth_dagster.data.scan import scan_parquet
from diffsynth_dagster.data.table.checked_table import FILE_NAME as CHECKED
from diffsynth_dagster.data.table.checked_table import read_checked
from diffsynth_dagster.errors import UserError
from diffsynth_dagster.facts import FileState, digest_of, fact_cache_of
from diffsynth_dagster.own_names import LISTING, is_own, is_promoted
from diffsynth_dagster.run.record import FILE_NAME as RECORD
from diffsynth_dagster.run.record import LIBRARIES, read_record
from diffsynth_dagster.weights.hub import ModelHub

Step = Literal["metadata", "latents", "checkpoints", "exports"]
# Folders beside a model's files that are read although no parameter names them.
_BESIDE = ("tokenizer*", "processor*", "scheduler*")


class NotTheSame(Exception):
    """A file has changed or is missing, or it cannot be found out whether it has."""


@dataclass(frozen=True)
class Read:
    """The inputs of a step.

    Attributes:
        values: parameters, versions and digests, as a JSON value.
        states: file that the step reads → its state. Missing files are left out.
    """

    values: Any
    states: Mapping[str, FileState]

    @property
    def digest(self) -> str:
        """Digest of the values and the states."""
        return digest_of([self.values, sorted(self.states.items())])

    def has_grown_to(self, now: "Read") -> bool:
        """Whether nothing has changed since, except that files were added, such as downloads."""
        return self.values == now.values and self.states.items() <= now.states.items()


def look_at(step: Step, config: TrainingConfig, beside: object = None) -> Read:
    """Collect the inputs of a step: parameters, versions of this package and of libraries, the
    output of the step before, and the files that it reads. Makes no request to a model hub.

    Args:
        beside: a further input, as a JSON value.

    Raises:
        NotTheSame: the output of the step before is missing; or the files of the step are not
            known.
        OSError: see `list_data`.
    """
    # `verify_content` asks to read every file; a table of prompts names files that are not looked
    # up here.
    if config.verify_content or config.sample_table is not None:
        raise NotTheSame
    made: dict[Step, list[Step]] = {
        "metadata": [],
        "latents": ["metadata"],
        "checkpoints": ["latents"],
        "exports": ["checkpoints"],
    }
    before = [digest_left(each, config, itself=False) for each in made[step]]
    # Where no table names the files, only a listing shows an added picture or edited caption.
    listed = [list_data(config).digest] if step == "metadata" and _has_no_list(config) else []
    return Read(
        [_parameters(step, config), _versions(), before, beside, *listed],
        _states([*_named_files(config), *_model_files(config, _local_hub())]),
    )


def look_at_model(entry: ModelEntry) -> Read:
    """The inputs of the step that loads one entry of a model list."""
    return Read([_versions(), entry.text], _states(_entry_files(entry, _local_hub())))


def _local_hub() -> ModelHub:
    """The hub, limited to files that were downloaded before."""
    return replace(ModelHub.from_environment(), skip_download=True)


def digest_left(step: Step, config: TrainingConfig, itself: bool = True) -> str:
    """Digest of what a step has left in the run folder and in the store.

    Args:
        itself: whether the question is about this step, and not about a later one. The step itself
            must check rejected rows again: the table does not say which files they have.

    Raises:
        NotTheSame: a part of it is missing, or the file of a row has changed since it was checked.
    """
    folder = Path(config.output_path)
    match step:
        case "metadata":
            for folder in _folders(config):
                _require_as_checked(folder, also_rejected=itself)
            return _digest_contents([folder / CHECKED for folder in _folders(config)], config)
        case "latents":
            listed = _manifests(config)
            shards = [_shards_of(path) for path in listed]
            return digest_of([_digest_contents(listed, config), *map(_own_states, shards)])
        case "checkpoints":
            return _own_states(_trained_files(folder))
        case "exports":
            found = [path for path in (folder / "exports").rglob("*") if path.is_file()]
            names = {path.relative_to(folder).as_posix() for path in found} | {LISTING}
            own = sorted(name for name in names if is_own(name) and not is_promoted(name))
            return _own_states(folder / name for name in own)


def _parameters(step: Step, config: TrainingConfig) -> dict[str, Any]:
    """Parameter → JSON value, for the parameters that affect this step or an earlier one."""
    last: dict[Step, Affects] = {
        "metadata": "rows",
        "latents": "latents",
        "checkpoints": "training",
        "exports": "exports",
    }
    # Those that affect "nothing" are included: some of them, such as paths, say where to look.
    kinds = [*AFFECTS[: AFFECTS.index(last[step]) + 1], "nothing"]
    values = config.model_dump(mode="json")
    return {name: value for name, value in values.items() if MARKS[name].affects in kinds}


def _has_no_list(config: TrainingConfig) -> bool:
    """Whether rows or captions come from files in a folder, and not from a table alone."""
    paths = (config.dataset_metadata_path, config.validation_metadata_path)
    is_folder = any(path is not None and os.path.isdir(path) for path in paths)
    return is_folder or config.caption_extension is not None


def _versions() -> dict[str, str]:
    """The versions of this package (under an empty name) and of the libraries."""
    return {"": __version__, **{name: version(name) for name in LIBRARIES}}


def _model_files(config: TrainingConfig, hub: ModelHub) -> list[Path]:
    """The model files of a config, and the tokenizers, processors and schedulers beside them."""
    files = {f for entry in named_entries(config) for f in _entry_files(entry, hub)}
    folders = {f.parent for f in files}
    # In the layout of diffusers, `tokenizer/` is beside the folder of the text encoder.
    roots = [*folders, *(folder.parent for folder in folders), *hub.base_path.glob("*/*")]
    beside = {f for root in roots for name in _BESIDE for f in root.glob(f"{name}/*")}
    return [*files, *beside]


def _entry_files(entry: ModelEntry, hub: ModelHub) -> list[Path]:
    """The files of one entry of a model list, with their config.json; none before its download."""
    try:
        if entry.parameter in MODEL_FOLDERS:
            return [path for path in hub.folder(entry).rglob("*") if path.is_file()]
        files = hub.files(entry)
    except UserError:
        return []
    return [*files, *{file.parent / "config.json" for file in files}]


def _named_files(config: TrainingConfig) -> list[Path]:
    """The existing files that parameters name: tables, and weights to start from."""
    texts = [t for t in names_that_affect(config, *AFFECTS).values() if isinstance(t, str)]
    return sorted(Path(text) for text in texts if os.path.isfile(text))


def _states(paths: Iterable[Path]) -> dict[str, FileState]:
    """File → its state. Folders and missing files are left out."""
    found = {str(path.absolute()): _state(path) for path in paths if not path.is_dir()}
    return {path: state for path, state in found.items() if state is not None}


def _state(path: Path) -> FileState | None:
    try:
        return FileState.of(path)
    except OSError:
        return None


def _own_states(paths: Iterable[Path]) -> str:
    """Digest of the states of files that this project wrote. Raises `NotTheSame` if one is missing.

    The change time is not part of it: a hard link to a file changes that, and nothing else.
    """
    hasher = blake3()
    for path in paths:
        try:
            stat = path.stat()
        except OSError as error:
            raise NotTheSame from error
        # Every writer here replaces a file, which gives it another inode.
        state = f"{path.absolute()} {stat.st_size} {stat.st_mtime_ns} {stat.st_ino}\n"
        hasher.update(state.encode("utf-8", "surrogateescape"))  # a path may be no valid UTF-8
    return hasher.hexdigest()


def _digest_contents(paths: list[Path], config: TrainingConfig) -> str:
    """Digest of the contents of tables, not their states: a step may rewrite an equal table."""
    if not all(path.is_file() for path in paths):
        raise NotTheSame
    with fact_cache_of(config.cache_path) as fact_cache:
        return digest_of([fact_cache.digest(path) for path in paths])


def _manifests(config: TrainingConfig) -> list[Path]:
    """The manifests that the training reads."""
    folders = _folders(config)
    # The second half of split training has no table: `dataset_base_path` is an encoded data set.
    if config.dataset_metadata_path is None:
        base = Path(config.dataset_base_path)
        folders = [base, *([base / HELD_OUT] if config.validation_metadata_path else [])]
    if config.makes_samples:
        folders.append(folders[0] / SAMPLES_FOLDER)
    return [folder / MANIFEST for folder in folders]


def _folders(config: TrainingConfig) -> list[Path]:
    """The folders of the data set's tables and, if there is one, of the held-out data set's."""
    held_out = held_out_config(config)
    return [Path(c.output_path) for c in (config, held_out) if c is not None]


def _require_as_checked(folder: Path, also_rejected: bool) -> None:
    """Require that the files of all rows are unchanged since the check, and links lead to the same
    files.

    Raises:
        NotTheSame: a file has changed; or, with `also_rejected`, there are rejected rows.
    """
    try:
        table = read_checked(folder)
        rejected = also_rejected and table.rejected.select(pl.len()).collect().item()
        base = Path(table.data["dataset_base_path"])
        if rejected or not all(_is_as_checked(*file) for file in _checked_files(table.rows, base)):
            raise NotTheSame
    except (UserError, OSError, KeyError, pl.exceptions.PolarsError) as error:
        raise NotTheSame from error


def _checked_files(rows: pl.LazyFrame, base: Path) -> Iterator[tuple[str, str, FileState]]:
    """Each file of the rows: its present path, then its path and its state at the check."""
    kinds = rows.collect_schema()
    # Folders are resolved once each, not once for every file in them.
    folders: dict[str, str] = {}
    for column in (name.removesuffix(":path") for name in kinds if name.endswith(":path")):
        columns = [column, *(f"{column}:{part}" for part in ("path", "size", "modified"))]
        part = rows.select(columns)
        if isinstance(kinds[f"{column}:path"], pl.List):
            part = part.explode(columns)
        # Many rows may name the same file.
        named = part.filter(pl.col(f"{column}:path").is_not_null()).unique()
        for name, path, size, modified in named.collect(engine="streaming").iter_rows():
            # The last part is not resolved: `_is_as_checked` does that only where it must.
            folder, file = os.path.split(base / name)
            if folder not in folders:
                folders[folder] = os.path.realpath(folder)
            yield os.path.join(folders[folder], file), path, FileState(size, modified)


def _is_as_checked(named: str, path: str, state: FileState) -> bool:
    """Whether a path still leads to the checked file, and that is unchanged."""
    return (named == path or os.path.realpath(named) == path) and _state(Path(path)) == state


def _shards_of(path: Path) -> list[Path]:
    """The shards of the store that hold the samples of a manifest. Raises `NotTheSame`."""
    try:
        manifest = read_manifest(path.parent)
        store = Path(manifest.store)
        # Joins in Polars: no Python object for each of up to 10⁷ keys.
        index = scan_parquet(sorted((store / "index").glob("*.parquet"))).select("key", "shard")
        missing = manifest.keys.join(index, on="key", how="anti").select(pl.len()).collect().item()
        shards = index.join(manifest.keys, on="key", how="semi").select("shard").unique().collect()
    except (UserError, OSError, pl.exceptions.PolarsError) as error:
        raise NotTheSame from error
    if missing:
        raise NotTheSame
    return sorted(store / "shards" / f"{name}.safetensors" for name in shards["shard"])


def _trained_files(folder: Path) -> list[Path]:
    """The record, checkpoints, samples and logs of a finished training. Raises `NotTheSame`."""
    try:
        record = read_record(folder)
    except UserError as error:
        raise NotTheSame from error
    if record is None or not record.finished or not record.checkpoints:
        raise NotTheSame
    return [folder / name for name in (RECORD, *record.checkpoints, *record.beside)]
