"""What happens beside the steps of a training, whenever it is due: checkpoints, sample pictures."""

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
    """Something that is done between two steps. Both methods are called by every process alike."""

    def due(self, step: int) -> bool:
        """Whether it is done after this step. Step 0 is before the first one."""
        ...

    def run(self, training: TrainingState, step: int) -> None:
        """Do it. Collective: it may wait for the other processes.

        Raises:
            Stopped: the run was asked to stop, and this can be done again from its beginning.
        """
        ...


def run_due(things: Sequence[Periodic], training: TrainingState, step: int, done: int = 0) -> int:
    """Do those of the things that are due after a step, in their order. Collective.

    Args:
        done: how many of the things were done before.

    Returns:
        How many are done: fewer than there are where the run was asked to stop.
    """
    for number, thing in enumerate(things[done:], start=done):
        if thing.due(step):
            try:
                thing.run(training, step)
            except Stopped:
                return number
    return len(things)


def end_early(things: Iterable[Periodic], training: TrainingState, step: int) -> None:
    """Do what the last step leaves, after a step that became the last: all that was not due.

    Raises:
        Stopped: the run was asked to stop.
    """
    for thing in things:
        if not thing.due(step):
            thing.run(training, step)


class SavePoints:
    """The steps that leave a checkpoint, and its name.

    Args:
        epoch_steps, total_steps: optimizer steps of an epoch and of the training.
    """

    def __init__(self, config: TrainingConfig, epoch_steps: int, total_steps: int) -> None:
        self._every = config.save_steps
        self._epoch_steps = epoch_steps
        self._total_steps = total_steps

    @property
    def count(self) -> int:
        """How many checkpoints the training leaves."""
        return -(-self._total_steps // (self._every or self._epoch_steps))

    def is_last(self, step: int) -> bool:
        """Whether a step is the last one."""
        return step == self._total_steps

    def name(self, step: int) -> str | None:
        """Name of the checkpoint that is due after a step. The last step always leaves one."""
        if step == 0:
            return None
        if step % (self._every or self._epoch_steps) and not self.is_last(step):
            return None
        ends_epoch = self._every is None and step % self._epoch_steps == 0
        return f"epoch-{step // self._epoch_steps - 1}" if ends_epoch else f"step-{step}"


class Checkpoints:
    """Writes the trained weights into the run folder, with the prefix of their names removed."""

    def __init__(self, points: SavePoints) -> None:
        self._points = points

    def warn_of_space(self, training: TrainingState) -> None:
        """Warn before the first step where not all that will be written fits on the disk. An older
        training keeps its space.
        """
        folder = Path(training.inputs.config.output_path)
        config = training.inputs.config
        size = sum(parameter.nbytes for parameter in training.trained.values())
        count = min(self._points.count, config.save_keep or self._points.count)
        there = [folder / name for name in training.inputs.run_file.record.checkpoints]
        written = sum(path.stat().st_size for path in there if path.is_file())
        needed = max(size, size * count - written)
        # AdamW keeps two numbers for each trained one. A new state is written before an old one goes.
        numbers = 3 if config.ema_sigma_rel is None else 4
        states = numbers * size * (config.state_keep + 1) if config.writes_states else 0
        what = "the checkpoint" if count == 1 else f"the {count} checkpoints"
        what += f" and {config.state_keep} states" if states else ""
        warning = short_of_space(folder, needed + states, f"{what} of the training")
        if warning is not None:
            training.inputs.reporter.warn(warning)

    def due(self, step: int) -> bool:
        """Whether a step leaves a checkpoint."""
        return self._points.name(step) is not None

    def run(self, training: TrainingState, step: int) -> None:
        """Write one. Raises `OutputError`."""
        inputs = training.inputs
        # A training that ends early leaves one whose step no other would have.
        written = save_weights(training, step, self._points.name(step) or f"step-{step}")
        inputs.run_file.saved({path.name: digest for path, digest in written.items()})
        if inputs.parallel.is_main_process:
            for path in written:
                inputs.reporter.report(Saved(step, str(path)))
            _drop_older(inputs, len(written))
        inputs.parallel.wait_for_everyone()


def save_weights(training: TrainingState, step: int, name: str) -> dict[Path, str]:
    """Write the files of a checkpoint; returns each with its digest, which only the main process knows.
    Collective.

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
        inputs.run_file.saving(file.name for file in files)
        for file in files:
            path = Path(config.output_path) / file.name
            written[path] = ""
            names = names_in_file(training.trained, family, file)
            tensors = {names[n]: t for n, t in parallel.whole_weights(training.model, names)}
            if parallel.is_main_process:
                content = content_of(tensors, inputs.models.resolved, file, record, spelling)
                said = {"step": step} if spelling is None else {"step": step, "format": spelling}
                trained = list(file.trained)
                write_checkpoint(path, content, {**record.provenance, **said, "trained": trained})
                written[path] = digest_file(path)
    return written


def _drop_older(inputs: Inputs, files: int) -> None:
    """Remove all but the newest checkpoints, as `save_keep` says.

    Args:
        files: of a checkpoint.
    """
    keep = inputs.config.save_keep
    record = inputs.run_file.record
    names = [name for name in record.checkpoints if name not in record.best]
    older = names[: -keep * files] if keep is not None else []
    if older:  # first from the record, which names no file that is not there
        inputs.run_file.dropped(older)
        for name in older:
            (Path(inputs.config.output_path) / name).unlink(missing_ok=True)


class SamplePictures:
    """Makes the sample pictures of the recipe: before the first step and after the last, and between
    them as often as the recipe says, or else with each checkpoint."""

    def __init__(self, points: SavePoints, pictures: Pictures, every: int | None) -> None:
        self._points = points
        self._pictures = pictures
        self._every = every

    def due(self, step: int) -> bool:
        """Whether pictures belong to a step."""
        if self._every is None:
            return step == 0 or self._points.name(step) is not None
        return step % self._every == 0 or self._points.is_last(step)

    def run(self, training: TrainingState, step: int) -> None:
        """Make one picture of all prompts. Raises `OutputError`, `Stopped`."""
        self._pictures.sample(step)
