"""What happens beside the steps of a training, whenever it is due: checkpoints, sample pictures."""

from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

from diffsynth_dagster.config.parameters import TrainingConfig
from diffsynth_dagster.facts import digest_file
from diffsynth_dagster.files import short_of_space
from diffsynth_dagster.training.checkpoint import (
    checkpoint_files,
    strip_prefix,
    trained_state,
    write_checkpoint,
)
from diffsynth_dagster.training.pictures import Pictures
from diffsynth_dagster.training.setup import Work


class Periodic(Protocol):
    """Something that is done between two steps. Both methods are called by every process alike."""

    def due(self, step: int) -> bool:
        """Whether it is done after this step. Step 0 is before the first one."""
        ...

    def run(self, work: Work, step: int) -> None:
        """Do it. Collective: it may wait for the other processes."""
        ...


def run_due(things: Iterable[Periodic], work: Work, step: int) -> None:
    """Do those of the things that are due after a step, in their order."""
    for thing in things:
        if thing.due(step):
            thing.run(work, step)


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

    def name(self, step: int) -> str | None:
        """Name of the checkpoint that is due after a step. The last step always leaves one."""
        if step == 0:
            return None
        if self._every is None:
            ends_epoch = step % self._epoch_steps == 0
            return f"epoch-{step // self._epoch_steps - 1}" if ends_epoch else None
        return f"step-{step}" if step % self._every == 0 or step == self._total_steps else None


class Checkpoints:
    """Writes the trained weights into the run folder, with the prefix of their names removed."""

    def __init__(self, points: SavePoints) -> None:
        self._points = points

    def warn_of_space(self, work: Work) -> None:
        """Warn before the first step where not all that will be written fits on the disk.

        Checkpoints of an older training are replaced one by one.
        """
        folder = Path(work.session.config.output_path)
        size = sum(parameter.nbytes for parameter in work.trained.values())
        count = self._points.count
        older = [p for kind in ("epoch", "step") for p in folder.glob(f"{kind}-*.safetensors")]
        replaced = sum(path.stat().st_size for path in older[:count])
        needed = max(size, size * count - replaced)
        warning = short_of_space(folder, needed, f"the {count} checkpoints of the training")
        if warning is not None:
            work.session.reporter.warned(warning)

    def due(self, step: int) -> bool:
        """Whether a step leaves a checkpoint."""
        return self._points.name(step) is not None

    def run(self, work: Work, step: int) -> None:
        """Write one. Raises `OutputError`."""
        session = work.session
        config, parallel, run_file = session.config, session.parallel, session.run_file
        weights = parallel.whole_weights(work.model, work.trained)
        if parallel.is_main_process:
            record = run_file.record
            family, name = session.models.found.family, self._points.name(step)
            assert name is not None
            removed = config.remove_prefix_in_ckpt
            written: dict[Path, str] = {}
            for file in checkpoint_files(name, family, record.trained, removed):
                state = trained_state(weights, family, file.trained)
                tensors = strip_prefix(state, file.removed)
                path = Path(config.output_path) / file.name
                write_checkpoint(path, tensors, {**record.provenance, "step": step})
                written[path] = digest_file(path)
            run_file.saved({path.name: digest for path, digest in written.items()})
            for path in written:
                session.reporter.saved(step, path)
        parallel.wait_for_everyone()


class SamplePictures:
    """Makes the sample pictures of the recipe: before the first step, and with each checkpoint."""

    def __init__(self, points: SavePoints, pictures: Pictures) -> None:
        self._points = points
        self._pictures = pictures

    def due(self, step: int) -> bool:
        """Whether a step is the start or leaves a checkpoint."""
        return step == 0 or self._points.name(step) is not None

    def run(self, work: Work, step: int) -> None:
        """Make one picture of all prompts. Raises `OutputError`."""
        self._pictures.sample(step)
