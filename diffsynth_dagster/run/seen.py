"""What a step read and what it left, told by the states of the files: whether it would only do again what
it did.

Nothing of torch's libraries is imported here, and no large file is read: this is asked before anything
else. Where the answer is no, the step itself finds out what has changed.
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
from diffsynth_dagster.cache.manifest import FILE_NAME as MANIFEST
from diffsynth_dagster.cache.manifest import read_manifest
from diffsynth_dagster.config.effect import AFFECTS, Affects, names_that_affect
from diffsynth_dagster.config.entries import MODEL_FOLDERS, ModelEntry, named_entries
from diffsynth_dagster.config.parameters import MARKS, TrainingConfig
from diffsynth_dagster.data.frames import scan_parquet
from diffsynth_dagster.data.listing import list_data
from diffsynth_dagster.data.table.checked import FILE_NAME as CHECKED
from diffsynth_dagster.data.table.checked import read_checked
from diffsynth_dagster.errors import UserError
from diffsynth_dagster.facts import FileState, digest_of, fact_cache_of
from diffsynth_dagster.own_names import LISTING, is_own, is_promoted
from diffsynth_dagster.run.record import FILE_NAME as RECORD
from diffsynth_dagster.run.record import LIBRARIES, read_record
from diffsynth_dagster.weights.hub import ModelHub

Step = Literal["metadata", "latents", "checkpoints", "exports"]
_BESIDE = ("tokenizer*", "processor*", "scheduler*")
"""Folders of a published model that are read though no parameter names them."""


class NotTheSame(Exception):
    """Something is not what it was, or is not there, or nothing tells whether it is."""


@dataclass(frozen=True)
class Read:
    """What a step goes by.

    Attributes:
        values: all but the files, as a JSON value.
        states: file → its state, of all that it reads and that is there.
    """

    values: Any
    states: Mapping[str, FileState]

    @property
    def digest(self) -> str:
        return digest_of([self.values, sorted(self.states.items())])

    def has_grown_to(self, now: "Read") -> bool:
        """Whether nothing has changed since, but for files that were downloaded."""
        return self.values == now.values and self.states.items() <= now.states.items()


def look_at(step: Step, config: TrainingConfig, beside: object = None) -> Read:
    """What a step of a recipe goes by: the parameters, the versions of this package and of the libraries,
    what the step before has left, and the files that it reads. The hub is asked nothing.

    Args:
        beside: a JSON value that it goes by as well.

    Raises:
        NotTheSame: what the step before leaves is not there; or which files there are is not known.
        OSError: see `list_data`.
    """
    if config.verify_content or config.sample_table is not None:
        raise NotTheSame
    made: dict[Step, list[Step]] = {
        "metadata": [],
        "latents": ["metadata"],
        "checkpoints": ["latents"],
        "exports": ["checkpoints"],
    }
    before = [digest_left(each, config, itself=False) for each in made[step]]
    # No file that a table names says that a caption file was edited, or a picture added to a folder.
    listed = [list_data(config).digest] if step == "metadata" and _has_no_list(config) else []
    return Read(
        [_parameters(step, config), _versions(), before, beside, *listed],
        _states([*_named_files(config), *_model_files(config, _local_hub())]),
    )


def look_at_model(entry: ModelEntry) -> Read:
    """What the step of one entry of a model list goes by."""
    return Read([_versions(), entry.text], _states(_entry_files(entry, _local_hub())))


def _local_hub() -> ModelHub:
    return replace(ModelHub.from_environment(), skip_download=True)


def digest_left(step: Step, config: TrainingConfig, itself: bool = True) -> str:
    """Digest of what a step has left in the run folder and in the store.

    Args:
        itself: whether that step is asked for, and not one that follows. It has to look anew at rows that it
            rejected, since the table does not say which files they are.

    Raises:
        NotTheSame: some of it is not there, or a row's file is no longer what was checked.
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
    """Parameter name → JSON value, but for those that affect a later step first."""
    last: dict[Step, Affects] = {
        "metadata": "rows",
        "latents": "latents",
        "checkpoints": "training",
        "exports": "exports",
    }
    kinds = [*AFFECTS[: AFFECTS.index(last[step]) + 1], "nothing"]
    values = config.model_dump(mode="json")
    return {name: value for name, value in values.items() if MARKS[name].affects in kinds}


def _has_no_list(config: TrainingConfig) -> bool:
    """Whether no table says all that the rows are."""
    named = (config.dataset_metadata_path, config.validation_metadata_path)
    folder = any(path is not None and os.path.isdir(path) for path in named)
    return folder or config.caption_extension is not None


def _versions() -> dict[str, str]:
    return {"": __version__, **{name: version(name) for name in LIBRARIES}}


def _model_files(config: TrainingConfig, hub: ModelHub) -> list[Path]:
    """The files that a config's models are read from, and what is read beside them."""
    files = {f for entry in named_entries(config) for f in _entry_files(entry, hub)}
    folders = {f.parent for f in files}
    roots = [*folders, *(folder.parent for folder in folders), *hub.base_path.glob("*/*")]
    beside = {f for root in roots for name in _BESIDE for f in root.glob(f"{name}/*")}
    return [*files, *beside]


def _entry_files(entry: ModelEntry, hub: ModelHub) -> list[Path]:
    """The files of one entry of a model list, and the config beside them; none where it is not there yet."""
    try:
        if entry.parameter in MODEL_FOLDERS:
            return [path for path in hub.folder(entry).rglob("*") if path.is_file()]
        files = hub.files(entry)
    except UserError:
        return []
    return [*files, *{file.parent / "config.json" for file in files}]


def _named_files(config: TrainingConfig) -> list[Path]:
    """The files that parameters name: tables, and weights to start from."""
    texts = [t for t in names_that_affect(config, *AFFECTS).values() if isinstance(t, str)]
    return sorted(Path(text) for text in texts if os.path.isfile(text))


def _states(paths: Iterable[Path]) -> dict[str, FileState]:
    found = {str(path.absolute()): _state(path) for path in paths if not path.is_dir()}
    return {path: state for path, state in found.items() if state is not None}


def _state(path: Path) -> FileState | None:
    try:
        return FileState.of(path)
    except OSError:
        return None


def _own_states(paths: Iterable[Path]) -> str:
    """Digest of the states of files of this project's own: that of a link to one changes, of the rest
    nothing. Raises `NotTheSame`."""
    hasher = blake3()
    for path in paths:
        try:
            stat = path.stat()
        except OSError as error:
            raise NotTheSame from error
        state = f"{path.absolute()} {stat.st_size} {stat.st_mtime_ns} {stat.st_ino}\n"
        hasher.update(state.encode("utf-8", "surrogateescape"))
    return hasher.hexdigest()


def _digest_contents(paths: list[Path], config: TrainingConfig) -> str:
    """Digest of the contents of tables, which may be written again as they were."""
    if not all(path.is_file() for path in paths):
        raise NotTheSame
    with fact_cache_of(config.cache_path) as fact_cache:
        return digest_of([fact_cache.digest(path) for path in paths])


def _manifests(config: TrainingConfig) -> list[Path]:
    """The lists of encoded samples that the training reads."""
    folders = _folders(config)
    if config.dataset_metadata_path is None:
        base = Path(config.dataset_base_path)
        folders = [base, *([base / HELD_OUT] if config.validation_metadata_path else [])]
    return [folder / MANIFEST for folder in folders]


def _folders(config: TrainingConfig) -> list[Path]:
    own = held_out_config(config)
    return [Path(c.output_path) for c in (config, own) if c is not None]


def _require_as_checked(folder: Path, also_rejected: bool) -> None:
    """Refuse a checked table with a row whose file is not what was checked, or whose link leads to another
    one; and one with rejected rows. Raises `NotTheSame`."""
    try:
        table = read_checked(folder)
        rejected = also_rejected and table.rejected.select(pl.len()).collect().item()
        base = Path(table.data["dataset_base_path"])
        if rejected or not all(_is_as_checked(*file) for file in _checked_files(table.rows, base)):
            raise NotTheSame
    except (UserError, OSError, KeyError, pl.exceptions.PolarsError) as error:
        raise NotTheSame from error


def _checked_files(rows: pl.LazyFrame, base: Path) -> Iterator[tuple[str, str, FileState]]:
    """Each file of the rows: as it is named, where it was found, and its state when it was checked."""
    kinds = rows.collect_schema()
    folders: dict[str, str] = {}
    for column in (name.removesuffix(":path") for name in kinds if name.endswith(":path")):
        columns = [column, *(f"{column}:{part}" for part in ("path", "size", "modified"))]
        part = rows.select(columns)
        if isinstance(kinds[f"{column}:path"], pl.List):
            part = part.explode(columns)
        named = part.filter(pl.col(f"{column}:path").is_not_null()).unique()
        for name, path, size, modified in named.collect(engine="streaming").iter_rows():
            folder, file = os.path.split(base / name)
            if folder not in folders:
                folders[folder] = os.path.realpath(folder)
            yield os.path.join(folders[folder], file), path, FileState(size, modified)


def _is_as_checked(named: str, path: str, state: FileState) -> bool:
    return (named == path or os.path.realpath(named) == path) and _state(Path(path)) == state


def _shards_of(path: Path) -> list[Path]:
    """The shards of the store that hold the samples of a manifest. Raises `NotTheSame`."""
    try:
        manifest = read_manifest(path.parent)
        store = Path(manifest.store)
        index = scan_parquet(sorted((store / "index").glob("*.parquet"))).select("key", "shard")
        lacks = manifest.keys.join(index, on="key", how="anti").select(pl.len()).collect().item()
        held = index.join(manifest.keys, on="key", how="semi").select("shard").unique().collect()
    except (UserError, OSError, pl.exceptions.PolarsError) as error:
        raise NotTheSame from error
    if lacks:
        raise NotTheSame
    return sorted(store / "shards" / f"{name}.safetensors" for name in held["shard"])


def _trained_files(folder: Path) -> list[Path]:
    """The files of a finished training: its record, its checkpoints, and what lies beside them."""
    try:
        record = read_record(folder)
    except UserError as error:
        raise NotTheSame from error
    if record is None or not record.finished or not record.checkpoints:
        raise NotTheSame
    return [folder / name for name in (RECORD, *record.checkpoints, *record.beside)]
