"""Explains why a training ran out of memory: what takes it, and what to change."""

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
"""A message suggests no more than these."""
_MOMENTS: Mapping[str, Moment] = {
    "diffsynth_dagster.training.sample_pictures": "while samples were made",
    "diffsynth_dagster.training.sampling": "while samples were made",
    "diffsynth_dagster.cache.encode": "while samples were encoded",
    "diffsynth_dagster.weights.models": "while models were loaded",
    "diffsynth_dagster.weights.load": "while models were loaded",
}
"""Module in a traceback → what the program was doing."""


@dataclass(frozen=True)
class Usage:
    """Bytes that a training uses of one device.

    Attributes:
        weights: of all loaded models, trained or not.
        gradients: those that exist now.
        optimizer: its state, as far as it exists.
        average: of the trained weights.
        others: the peak of everything else: activations, and what libraries need.
        total: of the device, or the limit of this process.
    """

    weights: int
    gradients: int
    optimizer: int
    average: int
    others: int
    total: int

    @property
    def parts(self) -> dict[Part, int]:
        """What a remedy can reduce → its bytes."""
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
    """Bytes that tensors occupy on a device. Memory that several of them share counts once."""
    held: dict[int, int] = {}
    for tensor in tensors:
        # Other layouts, such as sparse ones, have no single storage.
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
    """The memory of this process's device, and its known uses.

    Args:
        models: the components; those that are loaded count.

    Attributes:
        training: the training in progress; None before it is set up.
    """

    def __init__(self, config: TrainingConfig, models: Models) -> None:
        self._config, self._models = config, models
        self._device = models.device
        self.training: TrainingState | None = None
        # The program and its libraries, on a CPU. A GPU's allocator counts only tensors.
        self._before = 0 if self._device.type == "cuda" else psutil.Process().memory_info().rss

    def usage(self) -> Usage:
        """What the known uses take now, and the peak of the rest."""
        training = self.training
        modules: list[nn.Module] = [*self._models.modules.values()]
        if training is not None:
            # Mostly the same modules: `tensor_bytes` counts a tensor once.
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
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # KiB

    def _total(self) -> int:
        if self._device.type == "cuda":
            return torch.cuda.get_device_properties(self._device).total_memory
        # Such as `ulimit -v`; a limit of a container is not seen here.
        limit, _ = resource.getrlimit(resource.RLIMIT_AS)
        total = psutil.virtual_memory().total
        return total if limit == resource.RLIM_INFINITY else min(limit, total)

    @contextmanager
    def explained(self) -> Generator[None]:
        """Entered around a training: an error for lack of memory says what takes it, and what to
        try.

        Raises:
            OutOfMemory: there was not enough memory inside.
        """
        try:
            yield
        except Exception as error:
            # It may be explained already, by an inner block.
            cause = None if isinstance(error, OutOfMemory) else says_short(error)
            if cause is None:
                raise
            shortage = self._shortage(error, cause)
            traceback.clear_frames(error.__traceback__)  # their locals keep the step's tensors
            raise shortage from error

    def _shortage(self, error: BaseException, cause: BaseException) -> OutOfMemory:
        """The error that explains a lack of memory.

        Args:
            error: as it arrived here; its traceback tells what the training was doing.
            cause: the error behind it that says how much memory was asked for.
        """
        usage, moment = self.usage(), moment_of(error.__traceback__)
        found = remedies(self._config, self._models, moment)
        # The largest part first. The sort is stable, so the cheapest remedy of a part stays first.
        found.sort(key=lambda remedy: -usage.parts[remedy.part])
        asked = bytes_asked(cause)
        more = f": {size(asked)} more were asked for" if asked is not None else ""
        tries = "; ".join(remedy.said for remedy in found[:MOST_REMEDIES])
        return OutOfMemory(
            f"the memory of the {self._device.type.upper()} is not enough {moment}{more}; "
            f"it has {size(usage.total)}",
            where=f"it was taken by: {usage}",
            do=f"try, in this order: {tries}"
            if tries
            else "use a device with more, or a smaller model",
        )


def moment_of(trace: TracebackType | None) -> Moment:
    """What the training was doing when an error was raised: the outermost known module tells."""
    names = [str(f.f_globals.get("__name__", "")) for f, _ in traceback.walk_tb(trace)]
    moments: list[Moment] = [_MOMENTS[name] for name in names if name in _MOMENTS]
    return moments[0] if moments else "in the training"
