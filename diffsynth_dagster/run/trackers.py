"""Experiment trackers, through accelerate: which are switched on, and how each logs a picture.

accelerate logs numbers to all trackers in the same way, but has no common call for pictures. So
each tracker is called here as its own documentation says.
"""

from collections.abc import Callable, Collection, Mapping
from typing import TYPE_CHECKING, Any

from PIL import Image

from diffsynth_dagster.config.parameters import TrainingConfig
from diffsynth_dagster.config.validate import TRACKERS
from diffsynth_dagster.errors import ParameterError

if TYPE_CHECKING:
    from accelerate import Accelerator

Show = Callable[[Any, str, Image.Image, int], None]
"""(accelerate's tracker, name, picture, step): log the picture."""


def tracker_names(config: TrainingConfig, available: Collection[str]) -> list[str]:
    """The trackers that a config switches on, by accelerate's names.

    Args:
        available: the trackers that accelerate finds installed.

    Raises:
        ParameterError: the package of a tracker is not installed.
    """
    enabled = [n for n in TRACKERS if getattr(config, f"enable_{n}_log")]
    for name in enabled:
        if name not in available:
            raise ParameterError(
                f"{name} is not installed", where=f"enable_{name}_log", do=f"pip install {name}"
            )
    return enabled


def project_of(config: TrainingConfig) -> str:
    """The name of the project, the same in all trackers: accelerate takes only one."""
    # TensorBoard, the first, has no parameter for it. A slash would make subfolders.
    named = (getattr(config, f"{n}_project") for n in TRACKERS[1:] if _is_on(config, n))
    return next(named, config.wandb_project).replace("/", "-")


def _is_on(config: TrainingConfig, name: str) -> bool:
    return getattr(config, f"enable_{name}_log")


class Trackers:
    """The trackers of a training.

    Args:
        accelerator: made with the trackers of `tracker_names`.
    """

    def __init__(self, accelerator: "Accelerator") -> None:
        self._accelerator = accelerator

    def start(self, project: str) -> None:
        """Open the trackers under the name of a project. Collective."""
        self._accelerator.init_trackers(project)

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Log values of a step."""
        self._accelerator.log(dict(values), step=step)

    def show(self, name: str, picture: Image.Image, step: int) -> None:
        """Log a picture of a step."""
        for tracker in self._accelerator.trackers:
            _SHOWS[tracker.name](tracker, name, picture, step)

    def close(self) -> None:
        """Close the trackers. Called only by the process that logs."""
        self._accelerator.end_training()


def _to_tensorboard(tracker: Any, name: str, picture: Image.Image, step: int) -> None:
    import numpy as np

    pixels = np.asarray(picture.convert("RGB"))
    # A batch of one picture: (1, height, width, 3).
    tracker.log_images({name: pixels[None]}, step=step, dataformats="NHWC")


def _to_log_images(tracker: Any, name: str, picture: Image.Image, step: int) -> None:
    tracker.log_images({name: [picture]}, step=step)


def _to_trackio(tracker: Any, name: str, picture: Image.Image, step: int) -> None:
    import trackio  # pyright: ignore[reportMissingImports]

    tracker.log({name: trackio.Image(picture)}, step=step)


def _to_mlflow(tracker: Any, name: str, picture: Image.Image, step: int) -> None:
    import mlflow  # pyright: ignore[reportMissingImports]

    mlflow.log_image(picture.convert("RGB"), key=name, step=step)


_SHOWS: Mapping[str, Show] = {
    "tensorboard": _to_tensorboard,
    "wandb": _to_log_images,
    "swanlab": _to_log_images,
    "trackio": _to_trackio,
    "mlflow": _to_mlflow,
}
