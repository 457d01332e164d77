"""What the assets use: recipes, model hub, launcher, executor, and the parameters of a run."""

from resources.console import JOB_CONFIG, console_logger
from resources.executor import run_executor
from resources.failing import Cancelled, StepFailure, TriedAgain, cancelled
from resources.hub import Hub
from resources.keys import HUB, LAUNCHER, LOGGER, PARAMETERS
from resources.launcher import Launcher
from resources.parameters import Parameters, as_run_config, overridable
from resources.pools import pool_of
from resources.recipes import BrokenRecipe, identifier, load_recipes, recipes_folder

__all__ = [
    "HUB",
    "JOB_CONFIG",
    "LAUNCHER",
    "LOGGER",
    "PARAMETERS",
    "BrokenRecipe",
    "Cancelled",
    "Hub",
    "Launcher",
    "Parameters",
    "StepFailure",
    "TriedAgain",
    "as_run_config",
    "cancelled",
    "console_logger",
    "identifier",
    "load_recipes",
    "overridable",
    "pool_of",
    "recipes_folder",
    "run_executor",
]
