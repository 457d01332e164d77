"""Parameters: declared by group (`dataset`, `models`, `particular`, `course`, `output`), put
together (`parameters`), read from flags (`flags`) and recipes (`recipe`), and checked (`checks`).
What depends on which of them is in `effect`."""

from diffsynth_dagster.config.checks import read_config
from diffsynth_dagster.config.parameters import GROUPS, TrainingConfig
from diffsynth_dagster.config.recipe import Recipe, find_recipes, read_recipe

__all__ = ["GROUPS", "Recipe", "TrainingConfig", "find_recipes", "read_config", "read_recipe"]
