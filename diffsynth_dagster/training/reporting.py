"""What the trainer says while it works, and to whom. The loop knows only `Reporter`."""

import csv
import os
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from tqdm import tqdm

from diffsynth_dagster.cache.encode import EncodeReport
from diffsynth_dagster.config.parameters import TrainingConfig
from diffsynth_dagster.errors import ParameterError
from diffsynth_dagster.training.record import RunRecord


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

    def started(self, total_steps: int, config: TrainingConfig) -> None:
        """The loop starts."""

    def encoding(self, stage: str, done: int, total: int) -> None:
        """Samples of a stage were encoded into the store."""

    def encoded(self, report: EncodeReport) -> None:
        """The store holds every sample."""

    def stepped(self, metrics: StepMetrics) -> None:
        """An optimizer step was made."""

    def sampled(self, step: int, picture: Path) -> None:
        """Sample images were written as one picture."""

    def saved(self, step: int, checkpoint: Path) -> None:
        """A checkpoint was written."""

    def finished(self, record: RunRecord) -> None:
        """The training is at its end."""

    def close(self) -> None:
        """The training is over, finished or not."""


class Reporters(Reporter):
    """Several reporters as one."""

    def __init__(self, reporters: Sequence[Reporter]) -> None:
        self._reporters = reporters

    def started(self, total_steps: int, config: TrainingConfig) -> None:
        for reporter in self._reporters:
            reporter.started(total_steps, config)

    def encoding(self, stage: str, done: int, total: int) -> None:
        for reporter in self._reporters:
            reporter.encoding(stage, done, total)

    def encoded(self, report: EncodeReport) -> None:
        for reporter in self._reporters:
            reporter.encoded(report)

    def stepped(self, metrics: StepMetrics) -> None:
        for reporter in self._reporters:
            reporter.stepped(metrics)

    def sampled(self, step: int, picture: Path) -> None:
        for reporter in self._reporters:
            reporter.sampled(step, picture)

    def saved(self, step: int, checkpoint: Path) -> None:
        for reporter in self._reporters:
            reporter.saved(step, checkpoint)

    def finished(self, record: RunRecord) -> None:
        for reporter in self._reporters:
            reporter.finished(record)

    def close(self) -> None:
        for reporter in self._reporters:
            reporter.close()


class TerminalReporter(Reporter):
    """Progress bars with loss, step time and time left."""

    def __init__(self) -> None:
        self._bar: Any = None
        self._stage = ""

    def _new_bar(self, total: int, title: str, unit: str) -> None:
        self.close()
        self._bar = tqdm(total=total, desc=title, unit=unit, dynamic_ncols=True)

    def encoding(self, stage: str, done: int, total: int) -> None:
        if self._stage != stage:
            self._new_bar(total, f"encode {stage}", "sample")
            self._stage = stage
        self._bar.update(done - self._bar.n)

    def encoded(self, report: EncodeReport) -> None:
        self.close()
        for stage, misses in report.misses.items():
            print(f"{stage}: {report.hits[stage]} in the store, {misses} encoded", flush=True)

    def started(self, total_steps: int, config: TrainingConfig) -> None:
        self._new_bar(total_steps, "train", "step")

    def stepped(self, metrics: StepMetrics) -> None:
        self._bar.set_postfix(loss=f"{metrics.loss:.4f}", lr=f"{metrics.learning_rate:.1e}")
        self._bar.update(1)

    def saved(self, step: int, checkpoint: Path) -> None:
        tqdm.write(f"step {step}: wrote {checkpoint}")

    def finished(self, record: RunRecord) -> None:
        self.close()
        for name, value in record.evaluation.items():
            print(f"{name}: {value:.1%}", flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None


class CsvReporter(Reporter):
    """`metrics.csv` with every step; with `enable_csv_log` also `loss.csv` (step, loss)."""

    def __init__(self, config: TrainingConfig) -> None:
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
    """accelerate's trackers: TensorBoard, W&B, SwanLab."""

    def __init__(self, accelerator: Accelerator, config: TrainingConfig) -> None:
        self._accelerator = accelerator
        project = config.wandb_project
        if config.enable_swanlab_log and not config.enable_wandb_log:
            project = config.swanlab_project
        accelerator.init_trackers(project.replace("/", "-"))

    def stepped(self, metrics: StepMetrics) -> None:
        values = asdict(metrics)
        step = values.pop("step")
        self._accelerator.log(values, step=step)

    def close(self) -> None:
        self._accelerator.end_training()


class PipesReporter(Reporter):
    """Dagster, when it started this process: one message for each event, and for the newest step
    once a second."""

    def __init__(self) -> None:
        from dagster_pipes import open_dagster_pipes

        self._total = 0
        self._sent = 0.0
        self._stack = ExitStack()
        self._context = self._stack.enter_context(open_dagster_pipes())

    def _send(self, event: str, **values: Any) -> None:
        self._context.report_custom_message({"event": event, **values})

    def encoding(self, stage: str, done: int, total: int) -> None:
        self._send("encoding", stage=stage, done=done, total=total)

    def encoded(self, report: EncodeReport) -> None:
        self._send("encoded", hits=report.hits, misses=report.misses)

    def started(self, total_steps: int, config: TrainingConfig) -> None:
        self._total = total_steps
        self._send("started", total_steps=total_steps)

    def stepped(self, metrics: StepMetrics) -> None:
        if metrics.step == self._total or time.monotonic() - self._sent >= 1.0:
            self._sent = time.monotonic()
            self._send("step", **asdict(metrics))

    def sampled(self, step: int, picture: Path) -> None:
        self._send("sample", step=step, path=str(picture))

    def saved(self, step: int, checkpoint: Path) -> None:
        self._send("checkpoint", step=step, path=str(checkpoint))

    def finished(self, record: RunRecord) -> None:
        self._send("finished", steps=record.steps)

    def close(self) -> None:
        self._stack.close()


def tracker_names(config: TrainingConfig) -> list[str]:
    """The trackers that a config switches on.

    Raises:
        ParameterError: the package of one is not installed.
    """
    from accelerate.tracking import get_available_trackers

    available = {str(getattr(t, "value", t)) for t in get_available_trackers()}
    wanted = [n for n in ("tensorboard", "wandb", "swanlab") if getattr(config, f"enable_{n}_log")]
    for name in wanted:
        if name not in available:
            raise ParameterError(
                f"{name} is not installed", where=f"enable_{name}_log", do=f"pip install {name}"
            )
    return wanted


def make_reporter(accelerator: Accelerator, config: TrainingConfig) -> Reporter:
    """The reporters of a run: all on the main process, none on the others."""
    if not accelerator.is_main_process:
        if accelerator.log_with:
            accelerator.init_trackers("")
        return Reporter()
    reporters: list[Reporter] = [TerminalReporter()]
    if not config.encodes_only:
        reporters.append(CsvReporter(config))
    if accelerator.log_with:
        reporters.append(TrackerReporter(accelerator, config))
    if "DAGSTER_PIPES_CONTEXT" in os.environ:
        reporters.append(PipesReporter())
    return Reporters(reporters)
