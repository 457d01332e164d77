"""The progress of a training in Dagster: log lines, observations, and pictures of where it is."""

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dagster as dg

from assets.common import number
from assets.pictures import inline
from diffsynth_dagster.report.words import duration
from diffsynth_dagster.run.events import (
    Event,
    HeldOutMetrics,
    Sampled,
    Saved,
    Started,
    StepMetrics,
)
from diffsynth_dagster.run.progress import every_line

OBSERVE_SECONDS = 5.0
"""Least time between two observations of steps."""
_GROWTH, _PARTS = 5, 50
_PLOTTED = ("loss", "held_out_loss")
_MEBIBYTE = 1024 * 1024


class Pace:
    """Decides when something is observed: often at first, then after a fifth of the time since then,
    and at the latest after a fiftieth of the whole training. That is 90 times in a week."""

    def __init__(self) -> None:
        self._first: float | None = None
        self._last = 0.0

    def due(self, now: float, whole: float, least: float = 0.0) -> bool:
        """Whether to observe now. If so, it counts as done.

        Args:
            now: time in seconds.
            whole: how many seconds the training takes in all, as far as that is known.
            least: seconds that must have passed in any case.
        """
        if self._first is None:
            self._first = self._last = now
            return True
        pause = max(least, min((now - self._first) / _GROWTH, whole / _PARTS))
        if now - self._last < pause:
            return False
        self._last = now
        return True


class Progress:
    """Turns the events of a training into log lines and observations, whose losses are plotted over
    time in the UI. Dagster plots the newest 100 events of an asset.

    Args:
        show: puts the pictures and curves so far where the asset's page shows them.
    """

    def __init__(self, context: dg.AssetExecutionContext, show: Callable[[], None]) -> None:
        self._context, self._show = context, show
        self._total = self._first = 0
        self._began = time.monotonic()
        self._heard: list[float] = []
        self._losses: dict[str, float] = {}
        self._waiting: StepMetrics | None = None
        self._line = every_line()
        self._losses_pace, self._pictures_pace = Pace(), Pace()

    def hear(self, event: Event) -> None:
        """Handle one event; logs an observation when one is due."""
        log = self._context.log
        match event:
            case Started():
                self._total, self._first = event.total_steps, event.first
                self._began = time.monotonic()
                log.info(f"training {self._total} steps")
                if event.line is not None:
                    log.info(event.line)
            case Saved():
                log.info(event.line)
            case HeldOutMetrics():
                log.info(event.line)
                self._losses["held_out_loss"] = event.loss
                # If none is due, the next one of a step has it.
                if self._is_due(self._losses_pace, event.step):
                    self._observe(event.step, {})
            case Sampled():
                log.info(event.line)
                self._picture(event.step, Path(event.path))
            case StepMetrics():
                self._stepped(event)
            case _:
                pass

    def _is_due(self, pace: Pace, step: int, least: float = 0.0) -> bool:
        now = time.monotonic()
        return pace.due(now, now - self._began + self._left(step), least)

    def _left(self, step: int) -> float:
        """Seconds until the last step, if the others take as long as those so far."""
        made = step - self._first
        rate = (time.monotonic() - self._began) / made if made > 0 else math.inf
        return rate * (self._total - step) if self._total > step else 0.0

    def _stepped(self, metrics: StepMetrics) -> None:
        # Steps in between are dropped, but for their loss: only the newest is observed.
        self._waiting = metrics
        self._heard.append(metrics.loss)
        step, left = metrics.step, self._left(metrics.step)
        if self._line.due(step, self._total):
            more = f", {duration(left)} left" if left else ""
            self._context.log.info(f"step {step} of {self._total}: loss {metrics.loss:.4f}{more}")
        if self._is_due(self._losses_pace, step, OBSERVE_SECONDS):
            self.last()

    def last(self) -> None:
        """Log an observation of the newest step, unless it has one."""
        metrics, self._waiting = self._waiting, None
        if metrics is not None:
            self._observe(metrics.step, _measured(metrics))

    def _picture(self, step: int, path: Path) -> None:
        """Log an observation with the sample picture of a step."""
        from PIL import Image

        # Clips have an event too, but no observation: the picture of the step shows their frames.
        if path.suffix != ".png" or not path.is_file():
            return
        if not self._is_due(self._pictures_pace, step):
            return
        with Image.open(path) as picture:
            samples = inline(picture.convert("RGB"))
        self._observe(step, {"samples": samples})

    def _observe(self, step: int, facts: dict[str, Any]) -> None:
        """Log an observation, and show the pictures so far."""
        if self._heard:
            # The loss of one step says little: the mean of those since the last observation.
            self._losses["loss"] = sum(self._heard) / len(self._heard)
            self._heard = []
        left = self._left(step)
        told = {
            # All that is known in each, so that the plots have no gaps.
            **{name: number(self._losses[name]) for name in _PLOTTED if name in self._losses},
            "step": f"{step} of {self._total}" if self._total else str(step),
            **({"time_left": duration(left)} if 0 < left < math.inf else {}),
            **facts,
        }
        # Not with `yield`: a cancel at that moment would be raised inside Dagster's own code, and
        # the step would end without a reason.
        self._context.log_event(dg.AssetObservation(self._context.asset_key, metadata=told))
        self._show()


def _measured(metrics: StepMetrics) -> dict[str, str]:
    """What else was measured in a step. As text, for Dagster has a plot for each number."""
    parts = {
        "data": metrics.data_seconds,
        "forward and backward": metrics.forward_backward_seconds,
        "optimizer": metrics.optimizer_seconds,
    }
    return {
        "learning_rate": f"{metrics.learning_rate:.4g}",
        "grad_norm": f"{metrics.grad_norm:.4g}",
        "samples_per_second": f"{metrics.samples_per_second:.4g}",
        "tokens_per_second": f"{metrics.tokens_per_second:.4g}",
        "step_seconds": ", ".join(f"{name} {seconds:.3g}" for name, seconds in parts.items()),
        "peak_memory": f"{metrics.peak_memory_bytes / _MEBIBYTE:.0f} MiB",
    }
