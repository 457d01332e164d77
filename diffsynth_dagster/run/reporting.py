"""What the trainer reports while it works, and to whom. The loop knows only `Reporter`.

Nothing heavy is imported here: `failure.py` reports with it before anything else is loaded.
"""

import csv
import os
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from diffsynth_dagster.run.metrics import HeldOutMetrics, StepMetrics
from diffsynth_dagster.run.progress import (
    Every,
    Progress,
    ProgressBar,
    ProgressLines,
    every_line,
)

if TYPE_CHECKING:
    from diffsynth_dagster.cache.encode import EncodeReport
    from diffsynth_dagster.config.parameters import TrainingConfig
    from diffsynth_dagster.run.failure import Failure
    from diffsynth_dagster.run.record import RunRecord
    from diffsynth_dagster.run.trackers import Trackers

STEP_SECONDS = 1.0
"""Between two steps that are sent to Dagster, which plots some of them."""


class Reporter:
    """Listens to a training. Every method may be left as it is."""

    def warned(self, warning: str) -> None:
        """Something may go wrong later that can be mended now."""

    def started(self, total_steps: int, config: "TrainingConfig", first: int) -> None:
        """The loop starts, after so many steps that were made before."""

    def encoding(self, stage: str, done: int, total: int) -> None:
        """Samples of a stage were encoded into the store."""

    def encoded(self, report: "EncodeReport") -> None:
        """The store holds every sample."""

    def stepped(self, metrics: StepMetrics) -> None:
        """An optimizer step was made."""

    def held_out(self, metrics: HeldOutMetrics) -> None:
        """The held-out loss was measured."""

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

    def started(self, total_steps: int, config: "TrainingConfig", first: int) -> None:
        for reporter in self._reporters:
            reporter.started(total_steps, config, first)

    def encoding(self, stage: str, done: int, total: int) -> None:
        for reporter in self._reporters:
            reporter.encoding(stage, done, total)

    def encoded(self, report: "EncodeReport") -> None:
        for reporter in self._reporters:
            reporter.encoded(report)

    def stepped(self, metrics: StepMetrics) -> None:
        for reporter in self._reporters:
            reporter.stepped(metrics)

    def held_out(self, metrics: HeldOutMetrics) -> None:
        for reporter in self._reporters:
            reporter.held_out(metrics)

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

    def started(self, total_steps: int, config: "TrainingConfig", first: int) -> None:
        progress = self._begin("train", total_steps, "step")
        if first:
            tqdm.write(f"going on after step {first}")
            progress.reached(first, {})

    def stepped(self, metrics: StepMetrics) -> None:
        assert self._progress is not None, "a training starts before its first step"
        facts = {
            "loss": f"{metrics.loss:.4f}",
            "lr": f"{metrics.learning_rate:.1e}",
            "samples/s": f"{metrics.samples_per_second:.3g}",
        }
        self._progress.reached(metrics.step, facts)

    def held_out(self, metrics: HeldOutMetrics) -> None:
        tqdm.write(
            f"step {metrics.step}: held-out loss {metrics.loss:.4f}, of trained samples "
            f"{metrics.trained_loss:.4f}"
        )

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
    """`metrics.csv` with every step, and `held_out.csv` with every measurement of the held-out loss;
    with `enable_csv_log` also `loss.csv` (step, loss)."""

    def __init__(self, config: "TrainingConfig") -> None:
        self._stack = ExitStack()
        trained = (*config.trainable_models, *config.lora_base_model)
        rates = dict.fromkeys(trained if config.learning_rates else (), 0.0)
        columns = StepMetrics(0, 0, 0.0, 0.0, 0.0, 0.0, 0, learning_rates=rates).row()
        self._columns = {"metrics.csv": list(columns)}
        if config.enable_csv_log:
            self._columns["loss.csv"] = ["step", "loss"]
        self._folder = Path(config.output_path)
        self._tables: list[Any] = []
        self._held_out: Any = None

    def started(self, total_steps: int, config: "TrainingConfig", first: int) -> None:
        self._tables = [self._open(name, columns) for name, columns in self._columns.items()]

    def _open(self, name: str, columns: Sequence[str]) -> Any:
        path = self._folder / name
        file = self._stack.enter_context(path.open("a", newline="", buffering=1))
        table = csv.DictWriter(file, columns, extrasaction="ignore")
        if file.tell() == 0:
            table.writeheader()
        return table

    def stepped(self, metrics: StepMetrics) -> None:
        row = metrics.row()
        for table in self._tables:
            table.writerow(row)

    def held_out(self, metrics: HeldOutMetrics) -> None:
        row = metrics.row()
        if self._held_out is None:
            self._held_out = self._open("held_out.csv", list(row))
        self._held_out.writerow(row)

    def close(self) -> None:
        self._stack.close()


class TrackerReporter(Reporter):
    """TensorBoard, W&B, SwanLab, Trackio and MLflow, where a config switches them on."""

    def __init__(self, trackers: "Trackers") -> None:
        self._trackers = trackers

    def stepped(self, metrics: StepMetrics) -> None:
        values = metrics.row()
        step = values.pop("step")
        self._trackers.log(values, step)

    def held_out(self, metrics: HeldOutMetrics) -> None:
        values = metrics.row()
        step = int(values.pop("step"))
        self._trackers.log({f"held_out/{name}": value for name, value in values.items()}, step)

    def sampled(self, step: int, file: Path) -> None:
        if file.suffix == ".png":  # the frames of a clip are in its step's picture
            from PIL import Image

            with Image.open(file) as picture:
                # Not `samples`: a number of each step is called so.
                self._trackers.show("sample_pictures", picture.convert("RGB"), step)

    def close(self) -> None:
        self._trackers.close()


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

    def started(self, total_steps: int, config: "TrainingConfig", first: int) -> None:
        self._total, self._every = total_steps, Every(STEP_SECONDS)
        self._send("started", total_steps=total_steps, first=first)

    def stepped(self, metrics: StepMetrics) -> None:
        if self._every.due(metrics.step, self._total):
            self._send("step", **metrics.row())

    def held_out(self, metrics: HeldOutMetrics) -> None:
        self._send("held_out", **metrics.row())

    def sampled(self, step: int, file: Path) -> None:
        self._send("sample", step=step, path=str(file))

    def saved(self, step: int, checkpoint: Path) -> None:
        self._send("checkpoint", step=step, path=str(checkpoint))

    def finished(self, record: "RunRecord") -> None:
        self._send("finished", steps=record.steps)

    def close(self) -> None:
        self._stack.close()


def make_reporter(
    config: "TrainingConfig", is_main_process: bool, trackers: "Trackers | None"
) -> Reporter:
    """The reporters of a run: all on the main process, none on the others. Collective."""
    if trackers is not None:
        from diffsynth_dagster.run.trackers import project_of

        trackers.start(project_of(config))
    if not is_main_process:
        return Reporter()
    # Dagster logs what it receives: printed too, everything would be said twice.
    launched = "DAGSTER_PIPES_CONTEXT" in os.environ
    reporters: list[Reporter] = [PipesReporter() if launched else TerminalReporter()]
    if not config.encodes_only:
        reporters.append(CsvReporter(config))
    if trackers is not None:
        reporters.append(TrackerReporter(trackers))
    return Reporters(reporters)
