"""Work that is due now and then between the steps of a training: checkpoints, sample pictures."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol

from diffsynth_dagster.config.parameters import TrainingConfig
from diffsynth_dagster.errors import Stopped
from diffsynth_dagster.facts import digest_file
from diffsynth_dagster.files import short_of_space
from diffsynth_dagster.run.events import Saved
from diffsynth_dagster.training.checkpoint import (
    checkpoint_files,
    content_of,
    names_in_file,
    write_checkpoint,
)
from diffsynth_dagster.training.ema import evaluated_weights
from diffsynth_dagster.training.lora_formats import checkpoint_format
from diffsynth_dagster.training.sample_pictures import Pictures
from diffsynth_dagster.training.setup import Inputs, TrainingState


class Periodic(Protocol):
    """Something that is done between two steps. Every process calls both methods alike."""

    def due(self, step: int) -> bool:
        """Whether it is due after this step; step 0 is before the first one."""
        ...

    def run(self, training: TrainingState, step: int) -> None:
        """Do it. Collective: it may wait for the other processes.

        Raises:
            Stopped: the run was asked to stop. This is done again from its beginning later.
        """
        ...


def run_due(things: Sequence[Periodic], training: TrainingState, step: int, done: int = 0) -> int:
    """Do what is due after a step, in order. Collective.

    Args:
        done: how many of the things were done already, before a stop.

    Returns:
        How many of the things are done: fewer than there are if the run was asked to stop.
    """
    for number, thing in enumerate(things[done:], start=done):
        if thing.due(step):
            try:
                thing.run(training, step)
            except Stopped:
                return number
    return len(things)


def end_early(things: Iterable[Periodic], training: TrainingState, step: int) -> None:
    """Do the work of the last step after a step that became the last: everything that was not due.

    Raises:
        Stopped: the run was asked to stop.
    """
    for thing in things:
        if not thing.due(step):
            thing.run(training, step)


class SavePoints:
    """After which steps a checkpoint is written, and its name.

    Args:
        epoch_steps, total_steps: optimizer steps of an epoch and of the training.
    """

    def __init__(self, config: TrainingConfig, epoch_steps: int, total_steps: int) -> None:
        self._every = config.save_steps
        self._epoch_steps = epoch_steps
        self._total_steps = total_steps

    @property
    def count(self) -> int:
        """Number of checkpoints that the training writes."""
        return -(-self._total_steps // (self._every or self._epoch_steps))

    def is_last(self, step: int) -> bool:
        """Whether a step is the last one."""
        return step == self._total_steps

    def name(self, step: int) -> str | None:
        """Name of the checkpoint that is due after a step, if any. The last step always has one."""
        if step == 0:
            return None
        if step % (self._every or self._epoch_steps) and not self.is_last(step):
            return None
        # Epochs are counted from 0 in names: epoch-0 is written when the first one ends.
        ends_epoch = self._every is None and step % self._epoch_steps == 0
        return f"epoch-{step // self._epoch_steps - 1}" if ends_epoch else f"step-{step}"


class Checkpoints:
    """Writes the trained weights into the run folder, without the prefix that the config
    removes."""

    def __init__(self, points: SavePoints) -> None:
        self._points = points

    def warn_of_space(self, training: TrainingState) -> None:
        """Warn before the first step if the checkpoints and states will not fit on the disk.

        An older training in the run folder is kept, so its space does not count as free.
        """
        folder = Path(training.inputs.config.output_path)
        config = training.inputs.config
        size = sum(parameter.nbytes for parameter in training.trained.values())
        count = min(self._points.count, config.save_keep or self._points.count)
        paths = [folder / name for name in training.inputs.run_file.record.checkpoints]
        written = sum(path.stat().st_size for path in paths if path.is_file())
        # At least one more, since a new checkpoint is written before an old one is removed.
        needed = max(size, size * count - written)
        # A state holds each trained number, AdamW's two moments of it, and perhaps its average. A
        # new state is written before an old one is removed.
        numbers = 3 if config.ema_sigma_rel is None else 4
        states = numbers * size * (config.state_keep + 1) if config.writes_states else 0
        what = "the checkpoint" if count == 1 else f"the {count} checkpoints"
        what += f" and {config.state_keep} states" if states else ""
        warning = short_of_space(folder, needed + states, f"{what} of the training")
        if warning is not None:
            training.inputs.reporter.warn(warning)

    def due(self, step: int) -> bool:
        """Whether a checkpoint is written after a step."""
        return self._points.name(step) is not None

    def run(self, training: TrainingState, step: int) -> None:
        """Write a checkpoint. Raises `OutputError`."""
        inputs = training.inputs
        # A training that ends early writes one after a step that is no save point.
        written = save_weights(training, step, self._points.name(step) or f"step-{step}")
        inputs.run_file.saved({path.name: digest for path, digest in written.items()})
        if inputs.parallel.is_main_process:
            for path in written:
                inputs.reporter.report(Saved(step, str(path)))
            _drop_older(inputs, len(written))
        # No process goes on to a step before the checkpoint is whole.
        inputs.parallel.wait_for_everyone()


def save_weights(training: TrainingState, step: int, name: str) -> dict[Path, str]:
    """Write the files of a checkpoint; returns each file → its digest, "" on all but the main
    process. Collective.

    Raises:
        OutputError: the run folder cannot be written.
    """
    inputs = training.inputs
    config, parallel, record = inputs.config, inputs.parallel, inputs.run_file.record
    family, removed = inputs.models.resolved.family, config.remove_prefix_in_ckpt
    spelling = checkpoint_format(config, family)
    written: dict[Path, str] = {}
    with evaluated_weights(training):
        files = checkpoint_files(name, family, record.trained, removed)
        # Named in the record first: after a kill, the files are known as this training's.
        inputs.run_file.saving(file.name for file in files)
        for file in files:
            path = Path(config.output_path) / file.name
            written[path] = ""
            names = names_in_file(training.trained, family, file)
            # On every process, since gathering is collective.
            tensors = {names[n]: t for n, t in parallel.whole_weights(training.model, names)}
            if parallel.is_main_process:
                content = content_of(tensors, inputs.models.resolved, file, record, spelling)
                facts = {"step": step} if spelling is None else {"step": step, "format": spelling}
                trained = list(file.trained)
                write_checkpoint(path, content, {**record.provenance, **facts, "trained": trained})
                written[path] = digest_file(path)
    return written


def _drop_older(inputs: Inputs, files: int) -> None:
    """Remove all but the newest `save_keep` checkpoints. The best one always stays.

    Args:
        files: number of files of a checkpoint.
    """
    keep = inputs.config.save_keep
    record = inputs.run_file.record
    names = [name for name in record.checkpoints if name not in record.best]
    older = names[: -keep * files] if keep is not None else []
    if older:
        # From the record first, so that it never names a file that is gone.
        inputs.run_file.dropped(older)
        for name in older:
            (Path(inputs.config.output_path) / name).unlink(missing_ok=True)


class SamplePictures:
    """Makes the sample pictures: before the first step, after the last, and in between every
    `sample_steps` or, if that is not given, with each checkpoint."""

    def __init__(self, points: SavePoints, pictures: Pictures, every: int | None) -> None:
        self._points = points
        self._pictures = pictures
        self._every = every

    def due(self, step: int) -> bool:
        """Whether pictures are made after a step."""
        if self._every is None:
            return step == 0 or self._points.name(step) is not None
        return step % self._every == 0 or self._points.is_last(step)

    def run(self, training: TrainingState, step: int) -> None:
        """Make the picture of all prompts. Raises `OutputError`, `Stopped`."""
        self._pictures.sample(step)
