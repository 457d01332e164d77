"""What assets work with: recipes, the model hub, parameters of one run, the launcher."""

from resources.executor import run_executor
from resources.hub import Hub
from resources.launcher import Launcher
from resources.parameters import Parameters
from resources.recipes import BrokenRecipe, load_recipes, recipes_folder

__all__ = [
    "BrokenRecipe",
    "Hub",
    "Launcher",
    "Parameters",
    "load_recipes",
    "recipes_folder",
    "run_executor",
]
