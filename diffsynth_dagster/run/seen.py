"""What a step read and what it left, told by the states of the files: whether it would only do again what
it did.

Nothing of torch's libraries is imported here, and no large file is read: this is asked before anything
else. Where the answer is no, the step itself finds out what has changed.
"""

import os
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import polars as pl
from blake3 import blake3

from diffsynth_dagster import __version__
from diffsynth_dagster.cache.held_out import held_out_config
from diffsynth_dagster.cache.manifest import FILE_NAME as MANIFEST
from diffsynth_dagster.cache.manifest import read_manifest
from diffsynth_dagster.config.effect import AFFECTS, Affects, names_that_affect
from diffsynth_dagster.config.entries import MODEL_FOLDERS, ModelEntry, named_entries
from diffsynth_dagster.config.parameters import MARKS, TrainingConfig
from diffsynth_dagster.data.frames import scan_parquet
from diffsynth_dagster.data.table.checked import FILE_NAME as CHECKED
from diffsynth_dagster.errors import UserError
from diffsynth_dagster.facts import FactCache, FileState, digest_of
from diffsynth_dagster.own_names import LISTING, is_own, is_promoted
from diffsynth_dagster.run.record import FILE_NAME as RECORD
from diffsynth_dagster.run.record import LIBRARIES, read_record
from diffsynth_dagster.weights.hub import ModelHub

Step = Literal["metadata", "latents", "checkpoints", "exports"]
_BESIDE = ("tokenizer*", "processor*", "scheduler*")
"""Folders of a published model that are read though no parameter names them."""


class NotTheSame(Exception):
    """Something is not what it was, or is not there, or nothing tells whether it is."""


def digest_read(step: Step, config: TrainingConfig, beside: object = None) -> str:
    """Digest of what a step goes by: the parameters, the versions of this package and of the libraries,
    and the states of the files that it reads. The hub is asked nothing.

    Args:
        beside: a JSON value that it goes by as well.

    Raises:
        NotTheSame: a file is not there.
    """
    if config.verify_content or config.sample_table is not None:
        raise NotTheSame  # what is asked for is to read the files; or which there are is not known
    hub = replace(ModelHub.from_environment(), skip_download=True)
    files = [*_named_files(config), *_model_files(config, hub)]
    made: dict[Step, list[Step]] = {
        "metadata": [],
        "latents": ["metadata"],
        "checkpoints": ["latents"],
        "exports": ["checkpoints"],
    }
    before = [digest_left(each, config) for each in made[step]]
    return digest_of([_parameters(step, config), _versions(), _states(files), before, beside])


def digest_model(entry: ModelEntry) -> str:
    """The same of one entry of a model list. Raises `NotTheSame`."""
    hub = replace(ModelHub.from_environment(), skip_download=True)
    return digest_of([_versions(), entry.text, _states(_entry_files(entry, hub))])


def digest_left(step: Step, config: TrainingConfig) -> str:
    """Digest of what a step has left in the run folder and in the store.

    Raises:
        NotTheSame: some of it is not there; or a row was rejected, or its file is no longer what was
            checked.
    """
    folder = Path(config.output_path)
    match step:
        case "metadata":
            for table in _checked_tables(config):
                _require_as_checked(table)
            return _digest_contents(_checked_tables(config), config)
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


def _versions() -> dict[str, str]:
    return {"": __version__, **{name: version(name) for name in LIBRARIES}}


def _model_files(config: TrainingConfig, hub: ModelHub) -> list[Path]:
    """The files that a config's models are read from, and what is read beside them."""
    files = {f for entry in named_entries(config) for f in _entry_files(entry, hub)}
    folders = {f.parent for f in files}
    roots = [*folders, *(folder.parent for folder in folders), *hub.base_path.glob("*/*")]
    beside = {f for root in roots for name in _BESIDE for f in root.glob(f"{name}/*")}
    return sorted({*files, *(f for f in beside if f.is_file())})


def _entry_files(entry: ModelEntry, hub: ModelHub) -> list[Path]:
    """The files of one entry of a model list, and the config beside them."""
    try:
        if entry.parameter in MODEL_FOLDERS:
            return sorted(p for p in hub.folder(entry).rglob("*") if p.is_file())
        files = hub.files(entry)
    except UserError as error:
        raise NotTheSame from error
    return [*files, *(p for p in {f.parent / "config.json" for f in files} if p.is_file())]


def _named_files(config: TrainingConfig) -> list[Path]:
    """The files that parameters name: tables, and weights to start from."""
    texts = [t for t in names_that_affect(config, *AFFECTS).values() if isinstance(t, str)]
    return sorted(Path(text) for text in texts if os.path.isfile(text))


def _states(paths: Iterable[Path]) -> list[tuple[str, FileState | None]]:
    return [(str(path.absolute()), _state(path)) for path in paths]


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
    with closing(FactCache(Path(config.cache_path) / "facts.sqlite")) as fact_cache:
        return digest_of([fact_cache.digest(path) for path in paths])


def _checked_tables(config: TrainingConfig) -> list[Path]:
    """The checked tables: of what is trained on, and of what is held out."""
    return [folder / CHECKED for folder in _folders(config)]


def _manifests(config: TrainingConfig) -> list[Path]:
    """The lists of encoded samples that the training reads."""
    if config.dataset_metadata_path is None:
        return [Path(config.dataset_base_path) / MANIFEST]
    return [folder / MANIFEST for folder in _folders(config)]


def _folders(config: TrainingConfig) -> list[Path]:
    own = held_out_config(config)
    return [Path(c.output_path) for c in (config, own) if c is not None]


def _require_as_checked(table: Path) -> None:
    """Refuse a checked table with a row whose file is not what was checked, and one with rejected rows:
    it does not say which files they are. Raises `NotTheSame`."""
    try:
        rows = scan_parquet(table)
        rejected = rows.filter(pl.col("status") != "ok").select(pl.len()).collect().item()
        changed = any(_state(path) != state for path, state in _checked_files(rows))
    except (OSError, pl.exceptions.PolarsError) as error:
        raise NotTheSame from error
    if rejected or changed:
        raise NotTheSame


def _checked_files(rows: pl.LazyFrame) -> Iterator[tuple[Path, FileState]]:
    """Each file of the rows, with its state when it was checked."""
    kinds = rows.collect_schema()
    for path in (name for name in kinds if name.endswith(":path")):
        columns = [path, *(path.removesuffix("path") + part for part in ("size", "modified"))]
        part = rows.select(columns)
        if isinstance(kinds[path], pl.List):
            part = part.explode(columns)
        named = part.filter(pl.col(path).is_not_null()).unique(path).collect(engine="streaming")
        for text, size, modified in named.iter_rows():
            yield Path(text), FileState(size, modified)


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
