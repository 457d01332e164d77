"""What the trainer reports while it works, and to whom. The loop knows only `Reporter`.

Nothing heavy is imported here: `failure.py` reports with it before anything else is loaded.
"""

import csv
import os
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from tqdm import tqdm

if TYPE_CHECKING:
    from diffsynth_dagster.cache.encode import EncodeReport
    from diffsynth_dagster.config.parameters import TrainingConfig
    from diffsynth_dagster.training.failure import Failure
    from diffsynth_dagster.training.parallel import Parallel
    from diffsynth_dagster.training.record import RunRecord

LINE_SECONDS, MOST_LINE_SECONDS = 5.0, 60.0
"""Between two lines of progress, at first and in a long training."""
STEP_SECONDS = 1.0
"""Between two steps that are sent to Dagster, which plots some of them."""


@dataclass(frozen=True)
class StepMetrics:
    """One optimizer step. `loss` is the mean over the step's samples on all processes, `seconds`
    the time of the step, `epoch` counts from 0 and `step` from 1."""

    step: int
    epoch: int
    loss: float
    learning_rate: float
    grad_norm: float
    seconds: float
    samples: int


class Reporter:
    """Listens to a training. Every method may be left as it is."""

    def warned(self, warning: str) -> None:
        """Something may go wrong later that can be mended now."""

    def started(self, total_steps: int, config: "TrainingConfig") -> None:
        """The loop starts."""

    def encoding(self, stage: str, done: int, total: int) -> None:
        """Samples of a stage were encoded into the store."""

    def encoded(self, report: "EncodeReport") -> None:
        """The store holds every sample."""

    def stepped(self, metrics: StepMetrics) -> None:
        """An optimizer step was made."""

    def sampled(self, step: int, file: Path) -> None:
        """Samples were written: all images of a step as one picture, or one clip."""

    def saved(self, step: int, checkpoint: Path) -> None:
        """A checkpoint was written."""

    def finished(self, record: "RunRecord") -> None:
        """The training is at its end."""

    def failed(self, failure: "Failure") -> None:
        """This process cannot finish its work."""

    def close(self) -> None:
        """The training is over, finished or not."""


class Reporters(Reporter):
    """Several reporters as one."""

    def __init__(self, reporters: Sequence[Reporter]) -> None:
        self._reporters = reporters

    def warned(self, warning: str) -> None:
        for reporter in self._reporters:
            reporter.warned(warning)

    def started(self, total_steps: int, config: "TrainingConfig") -> None:
        for reporter in self._reporters:
            reporter.started(total_steps, config)

    def encoding(self, stage: str, done: int, total: int) -> None:
        for reporter in self._reporters:
            reporter.encoding(stage, done, total)

    def encoded(self, report: "EncodeReport") -> None:
        for reporter in self._reporters:
            reporter.encoded(report)

    def stepped(self, metrics: StepMetrics) -> None:
        for reporter in self._reporters:
            reporter.stepped(metrics)

    def sampled(self, step: int, file: Path) -> None:
        for reporter in self._reporters:
            reporter.sampled(step, file)

    def saved(self, step: int, checkpoint: Path) -> None:
        for reporter in self._reporters:
            reporter.saved(step, checkpoint)

    def finished(self, record: "RunRecord") -> None:
        for reporter in self._reporters:
            reporter.finished(record)

    def close(self) -> None:
        for reporter in self._reporters:
            reporter.close()


class Every:
    """Says when progress is due: at its first part, at its last, and now and then between.

    Args:
        seconds: between two times.
        most: seconds up to which that grows in a long work, to a tenth of the time so far; it
            stays as it is when left out.
    """

    def __init__(self, seconds: float, most: float | None = None) -> None:
        self._seconds = seconds
        self._most = seconds if most is None else most
        self._began = time.monotonic()
        self._last: float | None = None

    def due(self, done: int, total: int) -> bool:
        """Whether to show that `done` of `total` is done; it counts as shown if so."""
        now = time.monotonic()
        pause = min(max(self._seconds, (now - self._began) / 10), self._most)
        if done < total and self._last is not None and now - self._last < pause:
            return False
        self._last = now
        return True


def every_line() -> Every:
    """When a line of progress is due in a log, which nobody wants to be full of them."""
    return Every(LINE_SECONDS, MOST_LINE_SECONDS)


class Progress(Protocol):
    """Shows how far a piece of work is."""

    def reached(self, done: int, facts: dict[str, str]) -> None:
        """`done` of the whole is done; `facts` are values to show beside it."""
        ...

    def close(self) -> None:
        """The work is over, or ended early."""
        ...


class ProgressBar:
    """A bar that is redrawn in place: for a terminal."""

    def __init__(self, title: str, total: int, unit: str) -> None:
        self._bar = tqdm(total=total, desc=title, unit=unit, dynamic_ncols=True)

    def reached(self, done: int, facts: dict[str, str]) -> None:
        """See `Progress`."""
        # Drawn with the next update: set_postfix would draw the bar for every step.
        self._bar.set_postfix(facts, refresh=False)
        self._bar.update(done - self._bar.n)

    def close(self) -> None:
        """See `Progress`."""
        self._bar.close()


class ProgressLines:
    """A plain line now and then: for a file or a pipe, where nothing can be redrawn."""

    def __init__(self, title: str, total: int, unit: str) -> None:
        self._title, self._total, self._unit = title, total, unit
        self._every = every_line()
        self._began = time.monotonic()

    def reached(self, done: int, facts: dict[str, str]) -> None:
        """See `Progress`."""
        if not self._every.due(done, self._total):
            return
        seconds = time.monotonic() - self._began
        left = tqdm.format_interval(seconds / max(done, 1) * (self._total - done))
        parts = [
            f"{self._title}: {self._unit} {done} of {self._total}",
            *(f"{name} {value}" for name, value in facts.items()),
            f"{tqdm.format_interval(seconds)} passed, {left} left",
        ]
        print(", ".join(parts), file=sys.stderr, flush=True)

    def close(self) -> None:
        """See `Progress`."""


class TerminalReporter(Reporter):
    """Progress with loss and time left, and what was written: for whoever watches the process."""

    def __init__(self) -> None:
        self._progress: Progress | None = None
        self._stage = ""

    def _begin(self, title: str, total: int, unit: str) -> Progress:
        self.close()
        kind = ProgressBar if sys.stderr.isatty() else ProgressLines
        self._progress = kind(title, total, unit)
        return self._progress

    def warned(self, warning: str) -> None:
        tqdm.write(f"warning: {warning}", file=sys.stderr)

    def encoding(self, stage: str, done: int, total: int) -> None:
        if self._progress is None or self._stage != stage:
            self._begin(f"encode {stage}", total, "sample")
            self._stage = stage
        assert self._progress is not None
        self._progress.reached(done, {})

    def encoded(self, report: "EncodeReport") -> None:
        self.close()
        for stage, misses in report.misses.items():
            print(f"{stage}: {report.hits[stage]} in the store, {misses} encoded", flush=True)

    def started(self, total_steps: int, config: "TrainingConfig") -> None:
        self._begin("train", total_steps, "step")

    def stepped(self, metrics: StepMetrics) -> None:
        assert self._progress is not None, "a training starts before its first step"
        facts = {"loss": f"{metrics.loss:.4f}", "lr": f"{metrics.learning_rate:.1e}"}
        self._progress.reached(metrics.step, facts)

    def saved(self, step: int, checkpoint: Path) -> None:
        tqdm.write(f"step {step}: wrote {checkpoint}")

    def finished(self, record: "RunRecord") -> None:
        self.close()
        for name, value in record.evaluation.items():
            print(f"{name}: {value:.1%}", flush=True)

    def close(self) -> None:
        if self._progress is not None:
            self._progress.close()
            self._progress = None


class CsvReporter(Reporter):
    """`metrics.csv` with every step; with `enable_csv_log` also `loss.csv` (step, loss)."""

    def __init__(self, config: "TrainingConfig") -> None:
        self._stack = ExitStack()
        folder = Path(config.output_path)
        self._metrics = self._table(folder / "metrics.csv", list(StepMetrics.__annotations__))
        self._loss = None
        if config.enable_csv_log:
            self._loss = self._table(folder / "loss.csv", ["step", "loss"])

    def _table(self, path: Path, columns: list[str]) -> Any:
        file = self._stack.enter_context(path.open("w", newline="", buffering=1))
        writer = csv.DictWriter(file, columns, extrasaction="ignore")
        writer.writeheader()
        return writer

    def stepped(self, metrics: StepMetrics) -> None:
        for table in (self._metrics, self._loss):
            if table is not None:
                table.writerow(asdict(metrics))

    def close(self) -> None:
        self._stack.close()


class TrackerReporter(Reporter):
    """TensorBoard, W&B and SwanLab, where a config switches them on."""

    def __init__(self, parallel: "Parallel") -> None:
        self._parallel = parallel

    def stepped(self, metrics: StepMetrics) -> None:
        values = asdict(metrics)
        step = values.pop("step")
        self._parallel.track(values, step)

    def close(self) -> None:
        self._parallel.end_trackers()


class PipesReporter(Reporter):
    """Dagster, when it launched this process: one message for each event; of steps and encoded
    samples, the newest now and then."""

    def __init__(self) -> None:
        from dagster_pipes import open_dagster_pipes

        self._total = 0
        self._stage = ""
        self._every = every_line()
        self._stack = ExitStack()
        self._context = self._stack.enter_context(open_dagster_pipes())

    def _send(self, event: str, **values: Any) -> None:
        self._context.report_custom_message({"event": event, **values})

    def warned(self, warning: str) -> None:
        self._send("warning", text=warning)

    def encoding(self, stage: str, done: int, total: int) -> None:
        if self._stage != stage:
            self._stage, self._every = stage, every_line()
        if self._every.due(done, total):
            self._send("encoding", stage=stage, done=done, total=total)

    def encoded(self, report: "EncodeReport") -> None:
        self._send("encoded", hits=report.hits, misses=report.misses)

    def started(self, total_steps: int, config: "TrainingConfig") -> None:
        self._total, self._every = total_steps, Every(STEP_SECONDS)
        self._send("started", total_steps=total_steps)

    def stepped(self, metrics: StepMetrics) -> None:
        if self._every.due(metrics.step, self._total):
            self._send("step", **asdict(metrics))

    def sampled(self, step: int, file: Path) -> None:
        self._send("sample", step=step, path=str(file))

    def saved(self, step: int, checkpoint: Path) -> None:
        self._send("checkpoint", step=step, path=str(checkpoint))

    def finished(self, record: "RunRecord") -> None:
        self._send("finished", steps=record.steps)

    def close(self) -> None:
        self._stack.close()


def _project(config: "TrainingConfig") -> str:
    """Name of the project in the trackers."""
    swanlab = config.enable_swanlab_log and not config.enable_wandb_log
    return (config.swanlab_project if swanlab else config.wandb_project).replace("/", "-")


def make_reporter(parallel: "Parallel", config: "TrainingConfig") -> Reporter:
    """The reporters of a run: all on the main process, none on the others. Collective."""
    if parallel.has_trackers:
        parallel.start_trackers(_project(config))
    if not parallel.is_main_process:
        return Reporter()
    # Dagster logs what it receives: printed too, everything would be said twice.
    launched = "DAGSTER_PIPES_CONTEXT" in os.environ
    reporters: list[Reporter] = [PipesReporter() if launched else TerminalReporter()]
    if not config.encodes_only:
        reporters.append(CsvReporter(config))
    if parallel.has_trackers:
        reporters.append(TrackerReporter(parallel))
    return Reporters(reporters)
