"""Makes Dagster definitions from a folder of recipes, for any Dagster project: as a component in
its `defs` folder, or merged into its own definitions."""

from collections.abc import Sequence
from pathlib import Path

import dagster as dg
from pydantic import Field

from assets import make_assets, with_automation
from assets.prefix import Prefix
from jobs import make_failure_sensors, make_jobs, make_retraining, make_upkeep
from resources import (
    HUB,
    LAUNCHER,
    LOGGER,
    PARAMETERS,
    Hub,
    Launcher,
    Parameters,
    console_logger,
    load_recipes,
    recipes_folder,
)

RESOURCES = {HUB: Hub(), LAUNCHER: Launcher(), PARAMETERS: Parameters()}
"""The same objects for every folder of recipes: merged definitions may share a resource key only if
the resource is the same object."""


def make_definitions(
    folder: Path | None = None, key_prefix: str | Sequence[str] | None = None
) -> dg.Definitions:
    """Assets, jobs, schedules, sensors and resources of a folder of recipes.

    They can be merged with other definitions without affecting these: there is no executor for all
    jobs, and no logger or resource under a name that others may use.

    A recipe that cannot be used raises nothing: its assets exist and fail with the reason.

    Args:
        folder: folder of the recipes. Left out: the one that the environment variable names, or
            `recipes` in the root of this project.
        key_prefix: first part, or parts, of all asset keys. The names of jobs, schedules, sensors
            and groups begin with it too.

    Raises:
        ParameterError: the folder does not exist; the prefix has characters other than letters,
            digits and '_'; or an environment variable has a wrong value.
    """
    prefix = Prefix.of(key_prefix)
    recipes, broken = load_recipes(recipes_folder() if folder is None else folder)
    jobs = make_jobs(recipes, broken, prefix)
    retraining = make_retraining(recipes, broken, prefix)
    upkeep = make_upkeep(prefix)
    # The prefix first: automation conditions refer to other assets by their final keys.
    assets = prefix.assets(make_assets(recipes, broken))
    steps = [asset.op.name for asset in assets]
    failures = make_failure_sensors(steps, [job.name for job in upkeep.jobs], prefix)
    return dg.Definitions(
        assets=with_automation(assets, recipes, prefix),
        jobs=[*jobs, *upkeep.jobs],
        schedules=[*retraining.schedules, *upkeep.schedules],
        sensors=[*retraining.sensors, *failures],
        resources=RESOURCES,
        loggers={LOGGER: console_logger},
    )


class Recipes(dg.Component, dg.Model, dg.Resolvable):
    """Trainings of diffusion models: the assets, jobs and schedules of a folder of recipes."""

    folder: str = Field(
        default="recipes",
        description="The folder of recipes (YAML files), from the folder of defs.yaml.",
    )
    key_prefix: str | Sequence[str] | None = Field(
        default=None,
        description="First part, or parts, of all asset keys, and before the names of jobs, "
        "schedules and groups: letters, digits and '_'.",
    )

    def build_defs(self, context: dg.ComponentLoadContext) -> dg.Definitions:
        """The definitions of the folder. (Called by Dagster.)"""
        # The path is that of defs.yaml, or of its folder.
        here = context.path if context.path.is_dir() else context.path.parent
        return make_definitions(here / self.folder, self.key_prefix)
