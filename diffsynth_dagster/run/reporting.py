"""Reporters show the events of a run: in the terminal, in CSV files, in trackers, and in Dagster.
The training loop knows only `Reporter`.

Nothing heavy is imported here: `guard.py` uses it before anything else is loaded.
"""

import csv
import os
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from diffsynth_dagster.run.events import (
    Encoded,
    Encoding,
    Event,
    Finished,
    HeldOutMetrics,
    Sampled,
    Saved,
    Started,
    StepMetrics,
    Warned,
    message_of,
)
from diffsynth_dagster.run.progress import (
    Progress,
    ProgressBar,
    ProgressLines,
    Throttle,
    every_line,
)

if TYPE_CHECKING:
    from diffsynth_dagster.config.parameters import TrainingConfig
    from diffsynth_dagster.run.trackers import Trackers

STEP_SECONDS = 1.0
"""Seconds between two steps that are sent to Dagster: each becomes an event in its database."""


class Reporter:
    """Receives the events of a run. This one ignores them; subclasses show those that they know."""

    def report(self, event: Event) -> None:
        """Show an event."""

    def warn(self, text: str) -> None:
        """Report a warning."""
        self.report(Warned(text))

    def close(self) -> None:
        """Release files and connections: the run has ended, finished or not."""


class Reporters(Reporter):
    """Hands each event to several reporters."""

    def __init__(self, reporters: Sequence[Reporter]) -> None:
        self._reporters = reporters

    def report(self, event: Event) -> None:
        for reporter in self._reporters:
            reporter.report(event)

    def close(self) -> None:
        for reporter in self._reporters:
            reporter.close()


class TerminalReporter(Reporter):
    """Shows progress with loss and remaining time, and written files, in a terminal."""

    def __init__(self) -> None:
        self._progress: Progress | None = None
        self._stage = ""

    def report(self, event: Event) -> None:
        match event:
            case Warned():
                # tqdm.write, not print: it does not tear the progress bar apart.
                tqdm.write(f"warning: {event.text}", file=sys.stderr)
            case Encoding():
                self._encoding(event)
            case Encoded():
                self.close()
                for stage, misses in event.misses.items():
                    print(
                        f"{stage}: {event.hits[stage]} in the store, {misses} encoded", flush=True
                    )
            case Started():
                progress = self._begin("train", event.total_steps, "step", event.first)
                if event.line is not None:
                    tqdm.write(event.line)
                    progress.reached(event.first, {})
            case StepMetrics():
                self._stepped(event)
            case HeldOutMetrics() | Saved():
                tqdm.write(event.line)
            case Finished():
                self.close()
                for name, value in event.evaluation.items():
                    print(f"{name}: {value:.1%}", flush=True)
            case _:
                pass

    def _begin(self, title: str, total: int, unit: str, first: int = 0) -> Progress:
        self.close()
        # A bar that is redrawn would fill a log file with copies of itself.
        kind = ProgressBar if sys.stderr.isatty() else ProgressLines
        self._progress = kind(title, total, unit, first)
        return self._progress

    def _encoding(self, event: Encoding) -> None:
        if self._progress is None or self._stage != event.stage:
            self._begin(f"encode {event.stage}", event.total, "sample")
            self._stage = event.stage
        assert self._progress is not None
        self._progress.reached(event.done, {})

    def _stepped(self, metrics: StepMetrics) -> None:
        assert self._progress is not None, "a training starts before its first step"
        facts = {
            "loss": f"{metrics.loss:.4f}",
            "lr": f"{metrics.learning_rate:.1e}",
            "samples/s": f"{metrics.samples_per_second:.3g}",
        }
        self._progress.reached(metrics.step, facts)

    def close(self) -> None:
        if self._progress is not None:
            self._progress.close()
            self._progress = None


class CsvReporter(Reporter):
    """Writes `metrics.csv` with every step, and `held_out.csv` with every measurement of the
    held-out loss; with `enable_csv_log` also `loss.csv` (step, loss)."""

    def __init__(self, config: "TrainingConfig") -> None:
        self._stack = ExitStack()
        trained = (*config.trainable_models, *config.lora_base_model)
        rates = dict.fromkeys(trained if config.learning_rates else (), 0.0)
        # The header needs all columns before the first step: take them from an event of zeros.
        columns = StepMetrics(0, 0, 0.0, 0.0, 0.0, 0.0, 0, learning_rates=rates).row()
        self._columns = {"metrics.csv": list(columns)}
        if config.enable_csv_log:
            self._columns["loss.csv"] = ["step", "loss"]
        self._folder = Path(config.output_path)
        self._tables: list[Any] = []
        self._held_out: Any = None

    def report(self, event: Event) -> None:
        match event:
            case Started():
                # Not before: older logs are first moved away, or cut back to the resumed state.
                self._tables = [self._open(*table) for table in self._columns.items()]
            case StepMetrics():
                row = event.row()
                for table in self._tables:
                    table.writerow(row)
            case HeldOutMetrics():
                row = event.row()
                # Opened late: without held-out samples there is no such file.
                if self._held_out is None:
                    self._held_out = self._open("held_out.csv", list(row))
                self._held_out.writerow(row)
            case _:
                pass

    def _open(self, name: str, columns: Sequence[str]) -> Any:
        path = self._folder / name
        # Line-buffered: after a kill, the last step is in the file.
        file = self._stack.enter_context(path.open("a", newline="", buffering=1))
        table = csv.DictWriter(file, columns, extrasaction="ignore")
        if file.tell() == 0:  # a resumed training appends to its file
            table.writeheader()
        return table

    def close(self) -> None:
        self._stack.close()


class TrackerReporter(Reporter):
    """Logs to those of TensorBoard, W&B, SwanLab, Trackio and MLflow that are switched on."""

    def __init__(self, trackers: "Trackers") -> None:
        self._trackers = trackers

    def report(self, event: Event) -> None:
        match event:
            case StepMetrics():
                values = event.row()
                step = values.pop("step")
                self._trackers.log(values, step)
            case HeldOutMetrics():
                values = event.row()
                step = int(values.pop("step"))
                self._trackers.log({f"held_out/{n}": value for n, value in values.items()}, step)
            case Sampled():
                self._sampled(event)
            case _:
                pass

    def _sampled(self, event: Sampled) -> None:
        if event.path.endswith(".png"):  # no clips: the picture of the step has frames of them
            from PIL import Image

            with Image.open(event.path) as picture:
                # Not `samples`: that is the name of a number of each step.
                self._trackers.show("sample_pictures", picture.convert("RGB"), event.step)

    def close(self) -> None:
        self._trackers.close()


class PipesReporter(Reporter):
    """Sends the events to Dagster, which launched this process: one message for each event. Of
    steps and encoded samples, only the newest now and then."""

    def __init__(self) -> None:
        # Only a process that Dagster launched needs this package.
        from dagster_pipes import open_dagster_pipes

        self._total = 0
        self._stage = ""
        self._every = every_line()
        self._stack = ExitStack()
        self._context = self._stack.enter_context(open_dagster_pipes())

    def report(self, event: Event) -> None:
        if self._is_due(event):
            self._context.report_custom_message(message_of(event))

    def _is_due(self, event: Event) -> bool:
        match event:
            case Encoding():
                # A new stage starts a new interval: its first event is shown at once.
                if self._stage != event.stage:
                    self._stage, self._every = event.stage, every_line()
                return self._every.due(event.done, event.total)
            case Started():
                self._total, self._every = event.total_steps, Throttle(STEP_SECONDS)
                return True
            case StepMetrics():
                return self._every.due(event.step, self._total)
            case _:
                return True

    def close(self) -> None:
        self._stack.close()


def make_reporter(
    config: "TrainingConfig", is_main_process: bool, trackers: "Trackers | None"
) -> Reporter:
    """The reporters of a run: all of them on the main process, none on the others. Collective,
    because starting the trackers is."""
    if trackers is not None:
        from diffsynth_dagster.run.trackers import project_of

        trackers.start(project_of(config))
    if not is_main_process:
        return Reporter()
    # Dagster logs the messages and the output of this process: printing them too would repeat them.
    launched = "DAGSTER_PIPES_CONTEXT" in os.environ
    reporters: list[Reporter] = [PipesReporter() if launched else TerminalReporter()]
    if not config.encodes_only:
        reporters.append(CsvReporter(config))
    if trackers is not None:
        reporters.append(TrackerReporter(trackers))
    return Reporters(reporters)
