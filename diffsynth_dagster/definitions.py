"""The code location of this project: the definitions of the folder of recipes."""

import dagster as dg

from diffsynth_dagster.component import make_definitions
from resources import run_executor


def make_code_location() -> dg.Definitions:
    """The definitions of the folder of recipes, with our executor for all runs.

    Jobs of recipes already have it. Here it is also for runs of assets that are picked in the UI.

    Raises:
        ParameterError: the folder does not exist, or an environment variable has a wrong value.
    """
    return dg.Definitions.merge(make_definitions(), dg.Definitions(executor=run_executor))


# The only `Definitions` at module level: Dagster refuses a module with several.
definitions = make_code_location()
