"""The longest that a run may take, by its tag `dagster/max_runtime`.

Dagster's daemon ends such runs where it runs and `run_monitoring` is on; with `dagster job execute` there may be
none. So whoever waits for a training looks too.
"""

import time
from dataclasses import dataclass

import dagster as dg

from diffsynth_dagster.config.recipe import MAX_RUNTIME


@dataclass(frozen=True)
class Deadline:
    """When a run has to end.

    Attributes:
        seconds: that it may take; None where it may take any.
        began: when the run began, in seconds since 1970.
    """

    seconds: float | None
    began: float

    @classmethod
    def of(cls, context: dg.AssetExecutionContext) -> "Deadline":
        """That of the run of a step. A tag that is no number is ignored, as Dagster does."""
        try:
            seconds = float(context.run.tags[MAX_RUNTIME])
        except (KeyError, ValueError):
            return cls(None, 0.0)
        record = context.instance.get_run_record_by_id(context.run.run_id)
        began = None if record is None else record.start_time
        return cls(seconds or None, time.time() if began is None else began)

    @property
    def is_over(self) -> bool:
        """Whether the time is up."""
        return self.seconds is not None and time.time() - self.began > self.seconds

    @property
    def told(self) -> str:
        """What a person reads when it is."""
        return f"the run took longer than the {self.seconds:g} s of its tag '{MAX_RUNTIME}'"
