"""`report.html` beside the steps: renewed while the training runs, and at its end."""

import time
from collections.abc import Sequence

from diffsynth_dagster.errors import OutputError
from diffsynth_dagster.report.page import load_templates, write_report
from diffsynth_dagster.training.periodic import Periodic, SavePoints
from diffsynth_dagster.training.setup import Inputs, TrainingState

FIRST_SECONDS = 10.0
"""A training that ends sooner has one report, at its end."""
SHARE = 0.01
"""The part of a training's time that its reports may take."""


class Reports:
    """Renews the report when there is something new to show: after a checkpoint, samples, or a
    measurement of the held-out loss.

    Args:
        beside: what is done beside the steps, before this.
    """

    def __init__(self, points: SavePoints, beside: Sequence[Periodic]) -> None:
        self._points = points
        self._beside = [*beside]
        self._next = time.monotonic() + FIRST_SECONDS
        # Now: the package may be upgraded while the training runs.
        load_templates()

    def due(self, step: int) -> bool:
        """Whether there is something new to show. Not after the last step: the loop writes that
        report when all is done."""
        if step == 0 or self._points.is_last(step):
            return False
        return any(thing.due(step) for thing in self._beside)

    def run(self, training: TrainingState, step: int) -> None:
        """Write the report, unless reports would take too much time."""
        began = time.monotonic()
        if began >= self._next:
            renew(training.inputs)
            ended = time.monotonic()
            self._next = ended + (ended - began) / SHARE


def renew(inputs: Inputs) -> None:
    """Write the report of a training, on the main process. That it cannot be written is only
    reported: it is made of files that are there, and can be made again."""
    if not inputs.parallel.is_main_process:
        return
    try:
        write_report(inputs.run_file.folder, inputs.run_file.record)
    except OutputError as error:
        inputs.reporter.warn(f"report.html was not written: {error.what}")
