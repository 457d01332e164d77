"""The events of a run: each is a dataclass. Those that are shown as one line of text have a `line`.

The training process sends them to Dagster's process as messages, so their values must fit into
JSON. Nothing heavy is imported here, because Dagster's code location reads events too.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Event:
    """Something that happened in a run."""


@dataclass(frozen=True)
class Warned(Event):
    """A warning about something that may go wrong later and can be mended now."""

    text: str


@dataclass(frozen=True)
class Encoding(Event):
    """The progress of encoding: `done` of `total` samples of a stage are in the store."""

    stage: str
    done: int
    total: int


@dataclass(frozen=True)
class Encoded(Event):
    """Encoding is finished. Stage → samples that the store had already, and that were encoded."""

    hits: dict[str, int]
    misses: dict[str, int]


@dataclass(frozen=True)
class Started(Event):
    """The training loop starts. `first`: the steps made before, more than 0 when resuming."""

    total_steps: int
    first: int

    @property
    def line(self) -> str | None:
        """The step after which a resumed training goes on; None for a new one."""
        return f"going on after step {self.first}" if self.first else None


@dataclass(frozen=True)
class Sampled(Event):
    """Samples were written to `path`: all images of a step as one picture, or one clip."""

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
    """The training reached its end after `steps` steps.

    Attributes:
        evaluation: see `RunRecord`.
    """

    steps: int
    evaluation: dict[str, float]


@dataclass(frozen=True)
class StepMetrics(Event):
    """An optimizer step was made.

    Measuring the times adds no synchronization with the GPU: reading the norm of the gradients
    waits for the backward pass anyway, and reading the loss at the end waits for the optimizer.

    Attributes:
        step, epoch: the step is counted from 1, the epoch from 0.
        loss: mean over the step's samples on all processes.
        grad_norm: the norm of all gradients together, before clipping.
        seconds: duration of the step, without the wait for its data.
        samples: number of samples in the step, on all processes.
        tokens: latent patches in these samples: see `cache.plan_samples.tokens`. Text tokens are not
            counted.
        data_seconds: how long this process waited for the step's data.
        forward_backward_seconds: from the first micro-batch until the norm of the gradients is
            known.
        optimizer_seconds: from then until the end of the step.
        learning_rate: the first learning rate.
        learning_rates: trained model → its learning rate, if the config sets any of them.
        samples_per_second, tokens_per_second: throughput, including the wait for data.
        peak_memory_bytes: peak memory so far: of this process's GPU, or of the process on a CPU.
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
        """Column → number. The learning rate of a model is in the column
        `learning_rate_<model>`."""
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
"""Measured fields of `StepMetrics`: they differ between two runs of the same training."""


@dataclass(frozen=True)
class HeldOutMetrics(Event):
    """The held-out loss was measured. Step 0 is the measurement before the first step.

    Attributes:
        loss: mean over the held-out samples.
        trained_loss: mean over as many samples that are trained on.
        ranges: the held-out loss in equal ranges of the schedule, the range with the most noise
            first.
        best_step: the step with the smallest held-out loss so far. Step 0 does not count.
    """

    step: int
    loss: float
    trained_loss: float
    ranges: list[float]
    best_step: int

    @property
    def gap(self) -> float:
        """How far the held-out loss is above that of trained samples. It grows when the training
        overfits."""
        return self.loss - self.trained_loss

    @property
    def line(self) -> str:
        """The two losses, for the terminal and the log."""
        return (
            f"step {self.step}: held-out loss {self.loss:.4f}, of trained samples "
            f"{self.trained_loss:.4f}"
        )

    def row(self) -> dict[str, float]:
        """Column → number. A range of the schedule is in a column such as `loss_0_25%`."""
        count = len(self.ranges)
        # The bounds of the ranges in percent of the schedule.
        bounds = [(round(100 * k / count), round(100 * (k + 1) / count)) for k in range(count)]
        named = {f"loss_{a}_{b}%": v for (a, b), v in zip(bounds, self.ranges, strict=True)}
        return {
            "step": self.step,
            "loss": self.loss,
            "trained_loss": self.trained_loss,
            "gap": self.gap,
            **(named if count > 1 else {}),
            "best_step": self.best_step,
        }


# The events that can be sent as messages, by name. `Failure` is not: it goes through files.
_SENT: Mapping[str, Callable[..., Event]] = {
    kind.__name__: kind
    for kind in (
        *(Warned, Encoding, Encoded, Started, Sampled, Saved, Finished),
        *(StepMetrics, HeldOutMetrics),
    )
}


def message_of(event: Event) -> dict[str, Any]:
    """An event as a message: the name of its class, and its values."""
    return {"event": type(event).__name__, **asdict(event)}


def event_of(message: Mapping[str, Any]) -> Event:
    """The inverse of `message_of`."""
    values = dict(message)
    return _SENT[values.pop("event")](**values)
