"""Jobs and schedules of the recipes, and what looks after their runs."""

from jobs.failures import make_failure_sensors
from jobs.training import make_jobs, make_schedules
from jobs.upkeep import make_upkeep

__all__ = ["make_failure_sensors", "make_jobs", "make_schedules", "make_upkeep"]
