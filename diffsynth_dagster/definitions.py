"""The code location: recipes in, Dagster definitions out."""

import dagster as dg

from assets import make_assets
from jobs import make_jobs, make_retraining
from resources import (
    Hub,
    Launcher,
    Parameters,
    console_logger,
    load_recipes,
    recipes_folder,
    run_executor,
)


def make_definitions() -> dg.Definitions:
    """Assets, jobs, schedules, sensors and resources of the recipes in the folder of recipes.

    Raises:
        ParameterError: the folder does not exist.
    """
    recipes, broken = load_recipes(recipes_folder())
    retraining = make_retraining(recipes, broken)
    return dg.Definitions(
        assets=make_assets(recipes, broken),
        jobs=make_jobs(recipes, broken),
        schedules=retraining.schedules,
        sensors=retraining.sensors,
        resources={"hub": Hub(), "launcher": Launcher(), "parameters": Parameters()},
        loggers={"console": console_logger},
        # The steps of a recipe form a line, and what is heavy in them runs in processes of its
        # own: a process for each step would only add seconds, and a generation between whoever
        # kills a run and the training that must die with it.
        executor=run_executor,
    )


definitions = make_definitions()
