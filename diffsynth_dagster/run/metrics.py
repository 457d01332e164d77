"""What is measured of an optimizer step, and of held-out samples."""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class StepMetrics:
    """One optimizer step.

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
class HeldOutMetrics:
    """A measurement of the held-out loss. Step 0 is before the first one.

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
