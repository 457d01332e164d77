"""Parameters: where they are written (`parameters`), read from flags (`flags`) and recipes
(`recipe`), and checked (`checks`)."""

from diffsynth_dagster.config.checks import read_config
from diffsynth_dagster.config.parameters import GROUPS, TrainingConfig
from diffsynth_dagster.config.recipe import Recipe, find_recipes, read_recipe

__all__ = ["GROUPS", "Recipe", "TrainingConfig", "find_recipes", "read_config", "read_recipe"]
