"""What takes the memory of a training, and what to say when there is not enough of it."""

import resource
import traceback
from collections.abc import Generator, Iterable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any, cast

import psutil
import torch
from torch import nn

from diffsynth_dagster.config.parameters import TrainingConfig
from diffsynth_dagster.errors import OutOfMemory
from diffsynth_dagster.shortage import bytes_asked, says_short, size
from diffsynth_dagster.training.remedies import Moment, Part, remedies
from diffsynth_dagster.weights.models import Models

if TYPE_CHECKING:
    from diffsynth_dagster.training.setup import TrainingState

MOST_REMEDIES = 3
_MOMENTS: Mapping[str, Moment] = {
    "diffsynth_dagster.training.sample_pictures": "while samples were made",
    "diffsynth_dagster.training.sampling": "while samples were made",
    "diffsynth_dagster.cache.encode": "while samples were encoded",
    "diffsynth_dagster.weights.models": "while models were loaded",
    "diffsynth_dagster.weights.load": "while models were loaded",
}
"""Module of this program that was at work → what it was doing."""


@dataclass(frozen=True)
class Usage:
    """Bytes of one device that a training takes.

    Attributes:
        weights: of all loaded models, trained or not.
        gradients: that are there.
        optimizer: its state, as far as it was made.
        average: of the trained weights.
        others: what was taken beside these at most: activations, and what libraries need.
        total: what the device has, or what this process may take of it.
    """

    weights: int
    gradients: int
    optimizer: int
    average: int
    others: int
    total: int

    @property
    def parts(self) -> dict[Part, int]:
        """What a remedy may make smaller → its bytes."""
        return {
            "activations": self.others,
            "weights": self.weights,
            "optimizer": self.gradients + self.optimizer + self.average,
        }

    def __str__(self) -> str:
        average = f", their average {size(self.average)}" if self.average else ""
        return (
            f"weights {size(self.weights)}, gradients {size(self.gradients)}, "
            f"optimizer {size(self.optimizer)}{average}, activations and all else at most "
            f"{size(self.others)}"
        )


def tensor_bytes(tensors: Iterable[torch.Tensor], device: torch.device) -> int:
    """Bytes of memory that tensors hold on a device, each once however many of them share it."""
    held: dict[int, int] = {}
    for tensor in tensors:
        if tensor.device.type == device.type and tensor.layout == torch.strided:
            storage = tensor.untyped_storage()
            held[storage.data_ptr()] = storage.nbytes()
    return sum(held.values())


def tensors_in(value: Any) -> Generator[torch.Tensor]:
    """The tensors of a nested value, such as the state of an optimizer."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in cast(Mapping[Any, Any], value).values():
            yield from tensors_in(item)
    elif isinstance(value, (list, tuple)):
        for item in cast(list[Any], value):
            yield from tensors_in(item)


class Memory:
    """The memory of this process's device, and what in it is known.

    Args:
        models: the components, as far as they are loaded.

    Attributes:
        training: in progress, once there is one.
    """

    def __init__(self, config: TrainingConfig, models: Models) -> None:
        self._config, self._models = config, models
        self._device = models.device
        self.training: TrainingState | None = None
        # Of the program itself. A GPU's allocator counts tensors alone.
        self._before = 0 if self._device.type == "cuda" else psutil.Process().memory_info().rss

    def usage(self) -> Usage:
        """What is taken now, and the most that was."""
        training = self.training
        modules: list[nn.Module] = [*self._models.modules.values()]
        if training is not None:
            modules.append(training.step_module)
        weights = [t for m in modules for t in (*m.parameters(), *m.buffers())]
        gradients = [t.grad for t in weights if t.grad is not None]
        state = [] if training is None else list(tensors_in(training.optimizer.state))
        average = [] if training is None else list(training.average.weights.values())
        known = [tensor_bytes(part, self._device) for part in (weights, gradients, state, average)]
        others = max(0, self._peak() - self._before - sum(known))
        return Usage(*known, others=others, total=self._total())

    def _peak(self) -> int:
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    def _total(self) -> int:
        if self._device.type == "cuda":
            return torch.cuda.get_device_properties(self._device).total_memory
        limit, _ = resource.getrlimit(resource.RLIMIT_AS)
        total = psutil.virtual_memory().total
        return total if limit == resource.RLIM_INFINITY else min(limit, total)

    @contextmanager
    def explained(self) -> Generator[None]:
        """Say what took the memory, and what to try, where there is not enough of it inside.

        Raises:
            OutOfMemory: there was not enough.
        """
        try:
            yield
        except Exception as error:
            cause = None if isinstance(error, OutOfMemory) else says_short(error)
            if cause is None:
                raise
            shortage = self._shortage(error, cause)
            traceback.clear_frames(error.__traceback__)  # they hold the tensors of the step
            raise shortage from error

    def _shortage(self, error: BaseException, cause: BaseException) -> OutOfMemory:
        usage, moment = self.usage(), moment_of(error.__traceback__)
        said = remedies(self._config, self._models, moment)
        # What makes the largest part smaller first; among those of one part, in their order.
        said.sort(key=lambda remedy: -usage.parts[remedy.part])
        asked = bytes_asked(cause)
        more = f": {size(asked)} more were asked for" if asked is not None else ""
        tries = "; ".join(remedy.said for remedy in said[:MOST_REMEDIES])
        return OutOfMemory(
            f"the memory of the {self._device.type.upper()} is not enough {moment}{more}; "
            f"it has {size(usage.total)}",
            where=f"it was taken by: {usage}",
            do=f"try, in this order: {tries}"
            if tries
            else "use a device with more, or a smaller model",
        )


def moment_of(trace: TracebackType | None) -> Moment:
    """What a training was doing where an error was raised."""
    names = [str(f.f_globals.get("__name__", "")) for f, _ in traceback.walk_tb(trace)]
    found: list[Moment] = [_MOMENTS[name] for name in names if name in _MOMENTS]
    return found[0] if found else "in the training"
