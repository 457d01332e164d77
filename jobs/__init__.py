"""Jobs of the recipes, and what starts them by itself."""

from jobs.retraining import Retraining, make_retraining
from jobs.training import make_jobs

__all__ = ["Retraining", "make_jobs", "make_retraining"]
