"""Which checkpoint of a run folder is exported."""

import json
from dataclasses import dataclass
from pathlib import Path

from diffsynth_dagster.config.parameters import TrainingConfig
from diffsynth_dagster.errors import OutputError
from diffsynth_dagster.facts import digest_file
from diffsynth_dagster.families.contract import Family
from diffsynth_dagster.run.record import RunRecord
from diffsynth_dagster.training.checkpoint import checkpoint_files
from diffsynth_dagster.weights.header import read_metadata
from diffsynth_dagster.weights.lora import PROVENANCE_KEY


@dataclass(frozen=True)
class Chosen:
    """The checkpoint that is exported.

    Attributes:
        paths: its files.
        digest: of its file, or of its files.
        unfinished: how far the training had come, such as "step 120 of 400"; None where it reached
            its end.
    """

    paths: list[Path]
    digest: str
    unfinished: str | None


def chosen_checkpoint(config: TrainingConfig, record: RunRecord, family: Family) -> Chosen:
    """The checkpoint that is exported: that of `export_checkpoint`, or see `RunRecord.chosen`.

    Of a training that was stopped or failed, and that none is named of, it is the newest whole one where
    that one is not whole.

    Raises:
        OutputError: there is none, or its bytes are not those that the training wrote.
    """
    folder = Path(config.output_path)
    damaged: Path | None = None
    if config.export_checkpoint is not None:
        every = [_named(config, record, family)]
    else:
        every = [record.chosen] if record.finished else _candidates(config, record, family)
    for names in every:
        paths = [folder / name for name in names]
        changed = [p for p in paths if not _is_whole(p, record)]
        if paths and not changed:
            unfinished = None if record.finished else _progress(paths[0], record)
            return Chosen(paths, record.digest_of_checkpoint(names), unfinished)
        damaged = damaged or next(iter(changed), None)
    if damaged is None:
        ended = "wrote no checkpoint" if record.finished else "ended before its first checkpoint"
        raise OutputError(f"the training {ended}", where=str(folder.absolute()), do="train again")
    raise OutputError(
        "the checkpoint is missing or was changed since the training wrote it",
        where=str(damaged.absolute()),
        do="train again",
    )


def _named(config: TrainingConfig, record: RunRecord, family: Family) -> list[str]:
    """The files of the checkpoint that `export_checkpoint` names. Raises `OutputError`."""
    asked, folder = config.export_checkpoint, Path(config.output_path)
    if asked == "last":
        return record.newest
    if asked == "best" and record.best:
        return record.best
    found: dict[int, list[str]] = {}
    for names in _candidates(config, record, family):
        if names and all((folder / name).is_file() for name in names):
            found.setdefault(step_of(folder / names[0]), names)
    if asked != "best" and asked is not None and int(asked) in found:
        return found[int(asked)]
    steps = ", ".join(map(str, sorted(found))) or "none"
    raise OutputError(
        "no best checkpoint is kept"
        if asked == "best"
        else f"there is no checkpoint of step {asked}",
        where=f"export_checkpoint = {asked}, {folder.absolute()}",
        do="train with keep_best, or leave it out"
        if asked == "best"
        else f"give the step of a checkpoint that is there: {steps}",
    )


def _candidates(config: TrainingConfig, record: RunRecord, family: Family) -> list[list[str]]:
    """The files of each checkpoint that a record names: first of the one that would be exported, then
    of the others, the newest first."""
    ends = [
        file.name
        for file in checkpoint_files("", family, record.trained, config.remove_prefix_in_ckpt)
    ]
    names = [n.removesuffix(ends[0]) for n in reversed(record.checkpoints) if n.endswith(ends[0])]
    every = [record.chosen, *([name + end for end in ends] for name in names)]
    return [files for files in every if set(files) <= record.checkpoints.keys()]


def _is_whole(path: Path, record: RunRecord) -> bool:
    return path.is_file() and digest_file(path) == record.checkpoints[path.name]


def _progress(path: Path, record: RunRecord) -> str:
    """How far a training had come when it wrote a checkpoint."""
    step = step_of(path)
    return f"step {step} of {record.total_steps}" if record.total_steps else f"step {step}"


def step_of(path: Path) -> int:
    """The step after which a checkpoint was written."""
    return json.loads(read_metadata(path)[PROVENANCE_KEY])["step"]
