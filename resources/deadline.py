"""The time limit of a run: its tag `dagster/max_runtime`.

Dagster's daemon ends runs that exceed it, if a daemon runs and `run_monitoring` is on. With
`dagster job execute` there may be no daemon, so the launcher checks the limit as well.
"""

import time
from dataclasses import dataclass

import dagster as dg

from diffsynth_dagster.config.recipe import MAX_RUNTIME


@dataclass(frozen=True)
class Deadline:
    """When a run has to end.

    Attributes:
        seconds: how long the run may take; None without a limit.
        began: start of the run, in seconds since 1970.
    """

    seconds: float | None
    began: float

    @classmethod
    def of(cls, context: dg.AssetExecutionContext) -> "Deadline":
        """The deadline of a step's run. A tag that is not a number is ignored, as in Dagster."""
        try:
            seconds = float(context.run.tags[MAX_RUNTIME])
        except (KeyError, ValueError):
            return cls(None, 0.0)
        record = context.instance.get_run_record_by_id(context.run.run_id)
        began = None if record is None else record.start_time
        # The record has no start time yet if the run began just now. Zero seconds mean no limit.
        return cls(seconds or None, time.time() if began is None else began)

    @property
    def is_over(self) -> bool:
        """Whether the time is up."""
        return self.seconds is not None and time.time() - self.began > self.seconds

    @property
    def told(self) -> str:
        """The message when the time is up."""
        return f"the run took longer than the {self.seconds:g} s of its tag '{MAX_RUNTIME}'"
