"""The code location: recipes in, Dagster definitions out."""

import dagster as dg

from diffsynth_dagster.component import make_definitions
from resources import run_executor


def make_code_location() -> dg.Definitions:
    """The recipes in the folder of recipes, and the executor of all runs: also of those with assets that
    are picked in the graph.

    Raises:
        ParameterError: the folder does not exist, or an environment variable has a wrong value.
    """
    return dg.Definitions.merge(make_definitions(), dg.Definitions(executor=run_executor))


definitions = make_code_location()
