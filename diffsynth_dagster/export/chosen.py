"""Choose the checkpoint of a run folder that is exported."""

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
        paths: the files of the checkpoint.
        digest: BLAKE3 of its one file, or the digest of several: see
            `RunRecord.digest_of_checkpoint`.
        unfinished: how far an unfinished training had come, such as "step 120 of 400"; None for a
            finished one.
    """

    paths: list[Path]
    digest: str
    unfinished: str | None


def chosen_checkpoint(config: TrainingConfig, record: RunRecord, family: Family) -> Chosen:
    """Return the checkpoint to export: the one that `export_checkpoint` names, else
    `RunRecord.chosen`.

    If the training was stopped or failed, and `export_checkpoint` names none, the newest undamaged
    checkpoint is taken where `RunRecord.chosen` is damaged.

    Raises:
        OutputError: there is no checkpoint, or its bytes have changed since the training wrote it.
    """
    folder = Path(config.output_path)
    damaged: Path | None = None
    if config.export_checkpoint is not None:
        candidates = [_named(config, record, family)]
    else:
        # A killed training may have been writing its newest checkpoint: try older ones as well.
        candidates = [record.chosen] if record.finished else _candidates(config, record, family)
    for names in candidates:
        paths = [folder / name for name in names]
        changed = [path for path in paths if not _is_whole(path, record)]
        if paths and not changed:
            unfinished = None if record.finished else _progress(paths[0], record)
            return Chosen(paths, record.digest_of_checkpoint(names), unfinished)
        # The first candidate is the one the user expects: its damage is reported.
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
    by_step: dict[int, list[str]] = {}
    for names in _candidates(config, record, family):
        if names and all((folder / name).is_file() for name in names):
            # Names may give the epoch; the step is in the header.
            by_step.setdefault(step_of(folder / names[0]), names)
    if asked != "best" and asked is not None and int(asked) in by_step:
        return by_step[int(asked)]
    steps = ", ".join(map(str, sorted(by_step))) or "none"
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
    """File names of each checkpoint: first of `RunRecord.chosen`, then of all, newest first."""
    # A checkpoint of several modules has a file for each: one stem, one suffix per module.
    suffixes = [
        file.name
        for file in checkpoint_files("", family, record.trained, config.remove_prefix_in_ckpt)
    ]
    first = suffixes[0]
    stems = [n.removesuffix(first) for n in reversed(record.checkpoints) if n.endswith(first)]
    checkpoints = [record.chosen, *([stem + suffix for suffix in suffixes] for stem in stems)]
    # Leave out a checkpoint of which only some files were recorded.
    return [names for names in checkpoints if set(names) <= record.checkpoints.keys()]


def _is_whole(path: Path, record: RunRecord) -> bool:
    return path.is_file() and digest_file(path) == record.checkpoints[path.name]


def _progress(path: Path, record: RunRecord) -> str:
    """How far a training had come when it wrote a checkpoint, as text."""
    step = step_of(path)
    return f"step {step} of {record.total_steps}" if record.total_steps else f"step {step}"


def step_of(path: Path) -> int:
    """The step after which a checkpoint was written, read from the header of its file."""
    return json.loads(read_metadata(path)[PROVENANCE_KEY])["step"]
