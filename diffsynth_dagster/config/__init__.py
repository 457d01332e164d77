"""The parameters of a training.

They are declared in groups (`dataset`, `models`, `family_specific`, `training`, `objective`,
`learning`, `output`, `validation`) and combined into one class (`parameters`). Their values are read from flags
(`flags`) or recipes (`recipe`) and then checked (`validate`). `affects` derives what a change of each
parameter makes out of date.
"""

from diffsynth_dagster.config.parameters import GROUPS, TrainingConfig
from diffsynth_dagster.config.recipe import Recipe, find_recipes, read_recipe
from diffsynth_dagster.config.validate import read_config

__all__ = ["GROUPS", "Recipe", "TrainingConfig", "find_recipes", "read_config", "read_recipe"]
