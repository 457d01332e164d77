"""What is reported of a run while it works: each event with its values, and with its line where it is
shown as one. They go from the process that trains to Dagster's as messages, whose values JSON has.

Nothing heavy is imported here: Dagster's code location reads events too.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Event:
    """Something that happened in a run."""


@dataclass(frozen=True)
class Warned(Event):
    """Something may go wrong later that can be mended now."""

    text: str


@dataclass(frozen=True)
class Encoding(Event):
    """Samples of a stage were encoded into the store."""

    stage: str
    done: int
    total: int


@dataclass(frozen=True)
class Encoded(Event):
    """The store holds every sample: for each stage, how many were there, and how many were encoded."""

    hits: dict[str, int]
    misses: dict[str, int]


@dataclass(frozen=True)
class Started(Event):
    """The loop starts, after so many steps that were made before."""

    total_steps: int
    first: int

    @property
    def line(self) -> str | None:
        """Where it goes on; None from the beginning."""
        return f"going on after step {self.first}" if self.first else None


@dataclass(frozen=True)
class Sampled(Event):
    """Samples were written: all images of a step as one picture, or one clip."""

    step: int
    path: str

    @property
    def line(self) -> str:
        """What was written, and when."""
        return f"step {self.step}: sampled {self.path}"


@dataclass(frozen=True)
class Saved(Event):
    """A file of a checkpoint was written."""

    step: int
    path: str

    @property
    def line(self) -> str:
        """What was written, and when."""
        return f"step {self.step}: wrote {self.path}"


@dataclass(frozen=True)
class Finished(Event):
    """The training is at its end.

    Attributes:
        evaluation: see `RunRecord`.
    """

    steps: int
    evaluation: dict[str, float]


@dataclass(frozen=True)
class StepMetrics(Event):
    """An optimizer step was made.

    No time costs a GPU a wait of its own: the norm of the gradients waits for the backward pass, and
    the loss, which is read last, for the optimizer.

    Attributes:
        step, epoch: counted from 1, and from 0.
        loss: mean over the step's samples on all processes.
        grad_norm: of all gradients together, before they are clipped.
        seconds: of the step, from when its data is there.
        samples: that it looked at, on all processes.
        tokens: patches of these samples' latents: see `cache.plan.tokens`. Those of texts are none.
        data_seconds: that this process waited for the step's data.
        forward_backward_seconds: of all micro-batches, until the norm of the gradients is known.
        optimizer_seconds: from then on.
        learning_rate: the first of the rates; learning_rates: those of the trained models by name, where
            the config gives some.
        samples_per_second, tokens_per_second: over the step and the wait for its data.
        peak_memory_bytes: most memory used so far: of this process's GPU, or of the process on a CPU.
    """

    step: int
    epoch: int
    loss: float
    learning_rate: float
    grad_norm: float
    seconds: float
    samples: int
    tokens: int = 0
    data_seconds: float = 0.0
    forward_backward_seconds: float = 0.0
    optimizer_seconds: float = 0.0
    samples_per_second: float = 0.0
    tokens_per_second: float = 0.0
    peak_memory_bytes: int = 0
    learning_rates: dict[str, float] = field(default_factory=dict[str, float])

    def row(self) -> dict[str, Any]:
        """Name → number; a learning rate of one model is called `learning_rate_<model>`."""
        values = dict(vars(self))
        rates: dict[str, float] = values.pop("learning_rates")
        return values | {f"learning_rate_{name}": rate for name, rate in rates.items()}


MEASURED = (
    "seconds",
    "data_seconds",
    "forward_backward_seconds",
    "optimizer_seconds",
    "samples_per_second",
    "tokens_per_second",
    "peak_memory_bytes",
)
"""What of it differs between two runs that make the same steps."""


@dataclass(frozen=True)
class HeldOutMetrics(Event):
    """The held-out loss was measured. Step 0 is before the first one.

    Attributes:
        loss: mean over the held-out samples.
        trained_loss: the same of as many samples that are trained on.
        ranges: the held-out loss by equal ranges of the schedule, that with the most noise first.
        best_step: the step with the smallest held-out loss so far, that before the first one apart.
    """

    step: int
    loss: float
    trained_loss: float
    ranges: list[float]
    best_step: int

    @property
    def line(self) -> str:
        """What was found, and when."""
        return (
            f"step {self.step}: held-out loss {self.loss:.4f}, of trained samples "
            f"{self.trained_loss:.4f}"
        )

    def row(self) -> dict[str, float]:
        """The values by name, each a number."""
        count = len(self.ranges)
        bounds = [(round(100 * k / count), round(100 * (k + 1) / count)) for k in range(count)]
        named = {f"loss_{a}_{b}%": v for (a, b), v in zip(bounds, self.ranges, strict=True)}
        return {
            "step": self.step,
            "loss": self.loss,
            "trained_loss": self.trained_loss,
            "gap": self.loss - self.trained_loss,
            **(named if count > 1 else {}),
            "best_step": self.best_step,
        }


_SENT: Mapping[str, Callable[..., Event]] = {
    kind.__name__: kind
    for kind in (
        *(Warned, Encoding, Encoded, Started, Sampled, Saved, Finished),
        *(StepMetrics, HeldOutMetrics),
    )
}


def message_of(event: Event) -> dict[str, Any]:
    """An event as it is sent: its kind and its values."""
    return {"event": type(event).__name__, **asdict(event)}


def event_of(message: Mapping[str, Any]) -> Event:
    """The event that `message_of` made a message of."""
    values = dict(message)
    return _SENT[values.pop("event")](**values)
