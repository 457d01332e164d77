"""A weight file: its header, what that says of where the file comes from, and its run folder."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast

from diffsynth_dagster.config.parameters import TrainingConfig
from diffsynth_dagster.config.recipe import read_recipe
from diffsynth_dagster.errors import ParameterError, WeightsError, shown
from diffsynth_dagster.facts import digest_file
from diffsynth_dagster.older import FOLDER as OLDER
from diffsynth_dagster.older import older_runs
from diffsynth_dagster.run.earlier import earlier_record
from diffsynth_dagster.run.record import RunRecord
from diffsynth_dagster.weights.header import (
    PROVENANCE_KEY,
    Header,
    read_header,
    read_metadata,
)

CONFIG = "config.yaml"
_LEVELS = 4
"""Of folders above a file: `exports/<format>/<component>/` of a run folder is three deep."""
_KINDS: Mapping[str, type] = {
    **dict.fromkeys(("identity", "family", "samples_digest", "config_digest", "version"), str),
    "base": dict,
    "samples": int,
}
"""What provenance must say, and as what; what it may say is in `_OPTIONAL`."""
_OPTIONAL: Mapping[str, type | tuple[type, ...]] = {
    "lora": (dict, type(None)),
    "trained": list,
    "step": int,
    "format": str,
    "size": list,
    "unfinished": str,
    "checkpoint": str,
    "architecture": str,
}


@dataclass(frozen=True)
class Run:
    """A run folder, which may be one in `older/`."""

    folder: Path
    record: RunRecord

    @cached_property
    def config(self) -> TrainingConfig | None:
        """The parameters of the training, as its `config.yaml` has them; None where that is not there.

        Raises:
            ParameterError: it cannot be read.
        """
        path = self.folder / CONFIG
        return read_recipe(path).config if path.is_file() else None

    @property
    def whole_folder(self) -> Path:
        """The run folder that the training was made in: that above `older/`."""
        return self.folder.parents[1] if self.folder.parent.name == OLDER else self.folder

    @property
    def started_in(self) -> Path:
        """The folder that the relative paths of the training start in: that from which its `output_path`
        leads to the run folder; where none does, the folder that this is called in."""
        output = Path(self.config.output_path if self.config is not None else "/")
        folder = self.whole_folder
        count = len(output.parts)
        if output.is_absolute() or ".." in output.parts or folder.parts[-count:] != output.parts:
            return Path.cwd()
        return Path(*folder.parts[:-count])

    @property
    def encoded_in(self) -> Path:
        """The folder in which its data set was encoded: its own, or the one that its config names."""
        if self.config is None or not self.config.reads_encoded:
            return self.whole_folder
        return self.started_in / self.config.dataset_base_path


@dataclass(frozen=True)
class Subject:
    """A weight file.

    Attributes:
        notes: the text entries of its header.
        said: its provenance; empty for a file of another tool.
        run: the training that wrote it; None where that is not found.
    """

    path: Path
    header: Header
    notes: Mapping[str, str]
    said: Mapping[str, Any]
    run: Run | None

    @cached_property
    def checkpoint(self) -> str | None:
        """The file in the run folder that it is, or is made of; None where the record names none."""
        if self.run is None:
            return None
        record = self.run.record
        if "checkpoint" not in self.said:
            return self.path.name if self.path.name in record.checkpoints else None
        digest = self.said["checkpoint"]
        names = [name for name, known in record.checkpoints.items() if known == digest]
        if not names and record.chosen and record.chosen_digest == digest:
            names = record.chosen
        return names[0] if names else None

    @cached_property
    def step(self) -> int | None:
        """The steps that were made before it was written; None where that is not known."""
        if "step" in self.said or self.run is None or self.checkpoint is None:
            return self.said.get("step")
        path = self.run.folder / self.checkpoint
        return provenance_of(path, read_metadata(path)).get("step") if path.is_file() else None

    @cached_property
    def is_as_written(self) -> bool | None:
        """Whether its bytes are those that the training wrote; None for exports, of which no digest is
        kept, and where there is no run folder."""
        if self.run is None or "checkpoint" in self.said or self.checkpoint is None:
            return None
        return digest_file(self.path) == self.run.record.checkpoints[self.checkpoint]

    def require_run(self) -> Run:
        """Its run folder.

        Raises:
            WeightsError: it has no provenance.
            ParameterError: the run folder is not found.
        """
        if not self.said:
            raise WeightsError(
                "the file has no provenance: no training of this project wrote it",
                where=str(self.path),
                do="give a checkpoint or an export of this trainer",
            )
        if self.run is None:
            raise ParameterError(
                "the run folder of the file is not found: its header names the training "
                f"{self.said['identity']}",
                where=str(self.path.absolute()),
                do="give the run folder with --run",
            )
        return self.run


def read_subject(path: Path, folder: Path | None = None) -> Subject:
    """Read a weight file and what is known of it.

    Args:
        folder: the run folder; left out, it is looked for above the file.

    Raises:
        WeightsError: the file is missing or damaged, or its provenance is nonsense.
        ParameterError: the folder holds no training that wrote it.
    """
    header = read_header(path)
    notes = read_metadata(path) if path.suffix == ".safetensors" else {}
    said = provenance_of(path, notes)
    return Subject(path, header, notes, said, _run_of(path, said, folder))


def provenance_of(path: Path, notes: Mapping[str, str]) -> dict[str, Any]:
    """The provenance in a header; empty where there is none.

    Raises:
        WeightsError: it is none that this project writes.
    """
    if PROVENANCE_KEY not in notes:
        return {}
    try:
        said = json.loads(notes[PROVENANCE_KEY])
        if not isinstance(said, dict):
            raise ValueError("it is no mapping")
        found = cast(dict[str, Any], said)
        if list(found) == ["format"]:  # of a file of another tool that was converted
            return {}
        wrong = [n for n, kind in _KINDS.items() if not isinstance(found.get(n), kind)]
        given = {name: kind for name, kind in _OPTIONAL.items() if name in found}
        wrong += [name for name, kind in given.items() if not isinstance(found[name], kind)]
        if wrong:
            raise ValueError(f"{wrong[0]} is {shown(found.get(wrong[0]))}")
    except (ValueError, RecursionError) as error:
        raise WeightsError(
            f"what the header says of where the file comes from cannot be read: {error}",
            where=str(path),
            do="give a file as the trainer wrote it",
        ) from error
    return found


def _run_of(path: Path, said: Mapping[str, Any], folder: Path | None) -> Run | None:
    """The training that a file is of. Raises `ParameterError`: it is not in the folder that is given."""
    if folder is not None and said:
        run = next((r for r in _runs_in(folder) if r.record.identity == said["identity"]), None)
        if run is None:
            raise ParameterError(
                f"no training in the folder wrote the file, which is of {said['identity']}",
                where=f"--run {folder}",
                do="give the run folder of the file, or leave it out",
            )
        return run
    above = path.absolute().parents[:_LEVELS] if said else ()
    found = (run for place in above for run in _runs_in(place))
    return next((run for run in found if run.record.identity == said["identity"]), None)


def _runs_in(folder: Path) -> Iterator[Run]:
    """The trainings of a run folder, the newest first; those with a damaged record are left out."""
    for place in (folder, *reversed(older_runs(folder))):
        record = earlier_record(place)
        if record is not None:
            yield Run(place.absolute(), record)
