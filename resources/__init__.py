"""What assets work with: recipes, the model hub, parameters of one run, the launcher."""

from resources.console import JOB_CONFIG, console_logger
from resources.executor import run_executor
from resources.failing import Cancelled, StepFailure, TriedAgain, cancelled
from resources.hub import Hub
from resources.launcher import Launcher
from resources.parameters import Parameters
from resources.pools import pool_of
from resources.recipes import BrokenRecipe, load_recipes, recipes_folder

__all__ = [
    "JOB_CONFIG",
    "BrokenRecipe",
    "Cancelled",
    "Hub",
    "Launcher",
    "Parameters",
    "StepFailure",
    "TriedAgain",
    "cancelled",
    "console_logger",
    "load_recipes",
    "pool_of",
    "recipes_folder",
    "run_executor",
]
