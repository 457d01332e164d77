"""What a run was launched with: the recipe, which must not have changed since, and overrides."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import dagster as dg

from assets.common import Kind, code_version, short_digest
from diffsynth_dagster.config import Recipe, TrainingConfig
from diffsynth_dagster.config.affects import AFFECTS, Affects
from diffsynth_dagster.config.parameters import MARKS
from diffsynth_dagster.errors import ParameterError
from resources import PARAMETERS, Launcher, Parameters

CODE_VERSION = "dagster/code_version"
"""Tag of a materialization. The asset is stale if its own code version is different."""
RECIPE, DIGEST = "diffsynth/recipe", "diffsynth/recipe_digest"
"""Tags of each step of a recipe: the recipe's name, and a digest of its content."""
OWN = {"diffsynth/own": "true"}
"""Tags of our steps that belong to no single recipe, such as those of weights."""
_LAST: dict[Kind, Affects] = {
    "metadata": "rows",
    "latents": "latents",
    "checkpoints": "training",
    "exports": "exports",
    "promoted": "exports",
}
"""Asset → the last mark, in the order of `AFFECTS`, whose parameters it depends on."""


@dataclass(frozen=True)
class Launched:
    """The parameters of a step: the recipe's, with the overrides of the run.

    Attributes:
        config: the recipe's parameters, with the overrides applied.
        overrides: parameters that the run sets to other values than the recipe, as JSON values.
        output_path: the recipe's own run folder.
        options: the same for the recipe's options, such as the number of processes.
    """

    config: TrainingConfig
    overrides: Mapping[str, Any]
    output_path: str
    options: Mapping[str, Any] = field(default_factory=dict[str, Any])

    def tags(self, kind: Kind) -> dict[str, str]:
        """Tags of a materialization: the code version of what really ran. With overrides it differs
        from the asset's own, so that Dagster shows the asset as stale."""
        version, uncounted = code_version(self.config, kind), self._uncounted(kind)
        return {CODE_VERSION: f"{version} {short_digest(uncounted)}" if uncounted else version}

    @property
    def facts(self) -> dict[str, dg.MetadataValue]:
        """Metadata of a materialization: the overrides, if any."""
        given = {**self.overrides, **self.options}
        return {"overrides": dg.MetadataValue.json(given)} if given else {}

    def _uncounted(self, kind: Kind) -> dict[str, Any]:
        """Overrides that change the asset although no code version holds them: other input files
        than the recipe's, which the assets upstream stand for, or another run folder."""
        last = AFFECTS.index(_LAST[kind])
        # Parameters that count by value are in the code version already.
        found = {
            name: value
            for name, value in self.overrides.items()
            if MARKS[name].by_content and AFFECTS.index(MARKS[name].affects) <= last
        }
        folder = os.path.abspath(self.config.output_path)
        return found if folder == os.path.abspath(self.output_path) else {**found, "in": folder}


def step_tags(recipe: Recipe) -> dict[str, str]:
    """Tags of a recipe's steps, which tell a run whether its recipe has changed since the launch.

    Dagster stores them with each run, as they were in the definitions that launched it (in the UI
    and in schedules: as last loaded). Runs of a job and of picked assets both have them.
    """
    # Not tags of the run: a re-execution copies those, with the old digest of the recipe.
    return {RECIPE: recipe.name, DIGEST: _digest_of(recipe)}


def launched(
    context: dg.AssetExecutionContext,
    recipe: Recipe,
    parameters: Parameters,
    launcher: Launcher | None = None,
) -> Launched:
    """The parameters of a step, after checking that the run may use them.

    Args:
        recipe: the recipe as this process loaded it.
        launcher: the launcher, for a step that runs processes.

    Raises:
        ParameterError: the recipe has changed since the run was launched; the run sets parameters
            but has steps of several recipes; or see `read_config`.
    """
    recipes = _recipes_of(context)
    if recipes is not None and (recipe.name, _digest_of(recipe)) not in recipes:
        raise ParameterError(
            "the recipe changed since the run was launched",
            where=str(recipe.path),
            do="reload definitions (in the UI: Deployment, then Reload beside the code location), and "
            "launch a new run",
        )
    given = parameters.given()
    # A run has one set of parameters, which would silently apply to all of its recipes.
    if given and len(recipes or ()) > 1:
        names = sorted(f"'{name}'" for name, _ in recipes or ())
        raise ParameterError(
            f"parameters of the run config are for one recipe, and the run has assets of "
            f"{', '.join(names[:-1])} and {names[-1]}",
            where=f"resources.{PARAMETERS}.config: {', '.join(sorted(given))}",
            do="launch a run for each recipe, or leave the parameters out and write them into the recipes",
        )
    config = parameters.apply(recipe.config)
    # A value that equals the recipe's is no override: the Launchpad may send it along.
    before, now = (c.model_dump(mode="json") for c in (recipe.config, config))
    overrides = {name: value for name, value in now.items() if value != before[name]}
    of_recipe = recipe.options.model_dump(mode="json")
    given = {} if launcher is None else launcher.given()
    options = {name: value for name, value in given.items() if value != of_recipe[name]}
    return Launched(config, overrides, recipe.config.output_path, options)


def _recipes_of(context: dg.AssetExecutionContext) -> set[tuple[str, str]] | None:
    """(name, digest) of each recipe that the run has steps of, as of its launch; None if Dagster
    stored no execution plan of the run."""
    steps = _tags_of_steps(context.instance, context.run)
    if steps is None:
        return None
    return {(tags[RECIPE], tags[DIGEST]) for tags in steps.values() if DIGEST in tags}


def _tags_of_steps(
    instance: dg.DagsterInstance, run: dg.DagsterRun
) -> dict[str, Mapping[str, str]] | None:
    """Step name → tags, for the steps that a run executes; None if Dagster stored no plan of it."""
    if run.execution_plan_snapshot_id is None:
        return None
    plan = instance.get_execution_plan_snapshot(run.execution_plan_snapshot_id)
    executed = plan.step_keys_to_execute
    return {step.key: step.tags or {} for step in plan.steps if step.key in executed}


@dataclass(frozen=True)
class Ours:
    """Which steps of a run are ours. In a team's Dagster, runs may also have steps of other code.

    Attributes:
        recipes: names of the recipes that the run has steps of, sorted.
        steps: names of our steps.
        all: whether all steps of the run are ours.
    """

    recipes: Sequence[str]
    steps: frozenset[str]
    all: bool


def ours_of(instance: dg.DagsterInstance, run: dg.DagsterRun) -> Ours:
    """Which steps of a run are ours, by the tags that they had when it was launched."""
    steps = _tags_of_steps(instance, run) or {}
    ours = {n for n, tags in steps.items() if RECIPE in tags or OWN.items() <= tags.items()}
    recipes = sorted({tags[RECIPE] for tags in steps.values() if RECIPE in tags})
    return Ours(recipes, frozenset(ours), bool(ours) and len(ours) == len(steps))


def _digest_of(recipe: Recipe) -> str:
    """Digest of everything in a recipe that decides what a run of it does."""
    irrelevant = {"description", "retrain", "tags", "retries"}
    options = recipe.options.model_dump(mode="json", exclude=irrelevant)
    # Of `retrain` only this one changes the training; the others say when it runs.
    if recipe.options.retrain is not None and recipe.options.retrain.warm_start:
        options["warm_start"] = True
    return short_digest({"parameters": recipe.config.model_dump(mode="json"), "options": options})
