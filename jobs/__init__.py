"""Jobs and schedules of the recipes."""

from jobs.training import make_jobs, make_schedules

__all__ = ["make_jobs", "make_schedules"]
