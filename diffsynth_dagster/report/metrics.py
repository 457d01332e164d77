"""`metrics.csv` as the report reads it."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import polars as pl

from diffsynth_dagster.data.scan import scan_csv
from diffsynth_dagster.report.charts import Chart, Line
from diffsynth_dagster.run.record import LOGS

_PARTS = {
    "forward_backward_seconds": "forward and backward pass",
    "optimizer_seconds": "optimizer",
    "data_seconds": "waiting for data",
}
_SMOOTHED = 20
"""The running mean is taken over this part of all steps."""
_LATEST = 100
"""The time left follows from so many of the last steps."""


@dataclass(frozen=True)
class Metrics:
    """The steps of a training so far.

    Attributes:
        steps: a row for each step; numbers that cannot be read are null. All columns are floats.
    """

    steps: pl.DataFrame

    @property
    def step(self) -> int:
        """The last step; 0 before the first."""
        return int(self.steps["step"][-1]) if self.steps.height else 0

    @property
    def seconds(self) -> float:
        """The time of all steps, with the wait for their data."""
        return float(sum(self._sum(name) for name in ("seconds", "data_seconds")))

    @property
    def samples_per_second(self) -> float | None:
        """Samples in a second, over all steps."""
        return self._sum("samples") / self.seconds if self.seconds else None

    def seconds_left(self, total_steps: int) -> float | None:
        """How long the remaining steps take, if they are like the latest; None before a step."""
        latest = Metrics(self.steps.tail(_LATEST))
        if not latest.steps.height:
            return None
        return latest.seconds / latest.steps.height * max(0, total_steps - self.step)

    def mean_loss(self, tenth: int) -> float | None:
        """The mean loss of a tenth of the steps, from 0 to 9; -1 is the last. None before a
        step."""
        losses = self.column("loss")
        size = max(1, len(losses) // 10)
        start = len(losses) - size if tenth < 0 else tenth * len(losses) // 10
        return mean([loss for _, loss in losses[start : start + size]])

    def column(self, name: str) -> list[tuple[float, float]]:
        """(step, value) of a column; empty if the file does not have it."""
        if name not in self.steps.columns:
            return []
        return self.steps.select("step", name).drop_nulls().rows()

    def parts(self) -> list[tuple[str, float, float]]:
        """Where the time of a step goes: part, mean seconds, and share of all."""
        means = {name: self._sum(column) for column, name in _PARTS.items()}
        total = sum(means.values())
        count = max(1, self.steps.height)
        return [(name, value / count, value / total) for name, value in means.items() if total]

    def loss_chart(self) -> Chart:
        """The loss of each step, and its running mean."""
        losses = self.column("loss")
        window = max(2, len(losses) // _SMOOTHED)
        values = pl.Series([loss for _, loss in losses], dtype=pl.Float64)
        # Not from the first step on: a mean of few steps is as unsteady as they are.
        means = values.rolling_mean(window, min_samples=max(1, window // 4)).to_list()
        mean_line = [
            (step, value)
            for (step, _), value in zip(losses, means, strict=True)
            if value is not None
        ]
        return Chart(
            "Training loss",
            "It jumps from step to step, because each draws other timesteps: look at the mean.",
            "loss",
            [
                Line("each step", losses, pale=True),
                Line(f"mean of {window} steps", mean_line),
            ],
        )

    def small_charts(self) -> list[Chart]:
        """The learning rate and the norm of the gradients."""
        return [
            Chart(
                "Learning rate",
                "What `learning_rate` and `lr_scheduler` made of it.",
                "learning rate",
                [Line("learning rate", self.column("learning_rate"))],
            ),
            Chart(
                "Norm of the gradients",
                "Before clipping. Peaks that do not go away mean that the learning rate is too high.",
                "norm",
                [Line("norm of the gradients", self.column("grad_norm"))],
            ),
        ]

    def _sum(self, name: str) -> float:
        return float(self.steps[name].sum()) if name in self.steps.columns else 0.0


def mean(values: Sequence[float]) -> float | None:
    """The mean of numbers; None without any."""
    return sum(values) / len(values) if values else None


def read_metrics(folder: Path) -> Metrics:
    """The steps that the log of a run folder tells of; none if it is missing or damaged."""
    path = folder / LOGS[0]
    nothing = Metrics(pl.DataFrame({"step": pl.Series([], dtype=pl.Float64)}))
    if not path.is_file():
        return nothing
    try:
        # As text first: the last line may be cut off, and a person may have edited another.
        frame = scan_csv(path, infer_schema=False, truncate_ragged_lines=True).collect()
    except (pl.exceptions.PolarsError, OSError):
        return nothing
    if "step" not in frame.columns:
        return nothing
    numbers = frame.with_columns(pl.all().cast(pl.Float64, strict=False))
    return Metrics(numbers.drop_nulls("step"))
