"""The jobs of the recipes, the schedules and sensors that start them, and upkeep of their runs."""

from jobs.failures import make_failure_sensors
from jobs.retraining import make_retraining
from jobs.training import make_jobs
from jobs.upkeep import make_upkeep

__all__ = ["make_failure_sensors", "make_jobs", "make_retraining", "make_upkeep"]
