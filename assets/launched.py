"""What a run was launched with: the recipe, which must be the same still, and what it sets otherwise."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import dagster as dg

from assets.common import Kind, code_version, short_digest
from diffsynth_dagster.config import Recipe, TrainingConfig
from diffsynth_dagster.config.effect import AFFECTS, Affects
from diffsynth_dagster.config.parameters import MARKS
from diffsynth_dagster.errors import ParameterError
from resources import PARAMETERS, Launcher, Parameters

CODE_VERSION = "dagster/code_version"
"""Tag of a materialization by which its asset is stale where it has another one."""
RECIPE, DIGEST = "diffsynth/recipe", "diffsynth/recipe_digest"
"""Tags of each step of a recipe: its name, and the digest of what it says."""
OWN = {"diffsynth/own": "true"}
"""Tags of steps of ours that are of no single recipe."""
_LAST: dict[Kind, Affects] = {
    "metadata": "rows",
    "latents": "latents",
    "checkpoints": "training",
    "exports": "exports",
    "promoted": "exports",
}
"""The last of what an asset depends on, in the order of `AFFECTS`."""


@dataclass(frozen=True)
class Launched:
    """What a step goes by.

    Attributes:
        config: the recipe's parameters, with those that the run sets in their place.
        overrides: those that the run sets otherwise than the recipe does, as JSON values.
        output_path: the recipe's own run folder.
        options: the recipe's options that the run sets otherwise: how many processes there are.
    """

    config: TrainingConfig
    overrides: Mapping[str, Any]
    output_path: str
    options: Mapping[str, Any] = field(default_factory=dict[str, Any])

    def tags(self, kind: Kind) -> dict[str, str]:
        """Tags of a materialization: the code version of what really ran. An asset whose own is another
        one is shown as stale."""
        version, beside = code_version(self.config, kind), self._beside(kind)
        return {CODE_VERSION: f"{version} {short_digest(beside)}" if beside else version}

    @property
    def facts(self) -> dict[str, dg.MetadataValue]:
        """Metadata of a materialization: the overrides, if there are any."""
        given = {**self.overrides, **self.options}
        return {"overrides": dg.MetadataValue.json(given)} if given else {}

    def _beside(self, kind: Kind) -> dict[str, Any]:
        """The overrides that are in no code version, and by which the asset is not that of its recipe:
        the assets upstream are those of the recipe's files, and its result lies in the recipe's folder."""
        last = AFFECTS.index(_LAST[kind])
        found = {
            name: value
            for name, value in self.overrides.items()
            if MARKS[name].by_content and AFFECTS.index(MARKS[name].affects) <= last
        }
        folder = os.path.abspath(self.config.output_path)
        return found if folder == os.path.abspath(self.output_path) else {**found, "in": folder}


def step_tags(recipe: Recipe) -> dict[str, str]:
    """Tags of a recipe's steps.

    With each run Dagster keeps the tags that its steps had where it was launched: in the UI, or by a
    schedule, those of the definitions as they were loaded last. They come with jobs and with assets
    that are picked in the graph. (Tags of a run would be taken over by its re-executions.)
    """
    return {RECIPE: recipe.name, DIGEST: _digest_of(recipe)}


def launched(
    context: dg.AssetExecutionContext,
    recipe: Recipe,
    parameters: Parameters,
    launcher: Launcher | None = None,
) -> Launched:
    """What a step of a recipe goes by.

    Args:
        recipe: as this process has loaded it.
        launcher: of a step that runs processes.

    Raises:
        ParameterError: the recipe is not the one that the run was launched with; the run sets
            parameters and has steps of several recipes; or see `read_config`.
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
    if given and len(recipes or ()) > 1:
        names = sorted(f"'{name}'" for name, _ in recipes or ())
        raise ParameterError(
            f"parameters of the run config are for one recipe, and the run has assets of "
            f"{', '.join(names[:-1])} and {names[-1]}",
            where=f"resources.{PARAMETERS}.config: {', '.join(sorted(given))}",
            do="launch a run for each recipe, or leave the parameters out and write them into the recipes",
        )
    config = parameters.apply(recipe.config)
    before, now = (c.model_dump(mode="json") for c in (recipe.config, config))
    overrides = {name: value for name, value in now.items() if value != before[name]}
    asked = recipe.options.model_dump(mode="json")
    given = {} if launcher is None else launcher.given()
    options = {name: value for name, value in given.items() if value != asked[name]}
    return Launched(config, overrides, recipe.config.output_path, options)


def _recipes_of(context: dg.AssetExecutionContext) -> set[tuple[str, str]] | None:
    """Name and digest of the recipes that a run has steps of, as they were when it was launched; None
    where Dagster kept no plan of it."""
    steps = _tags_of_steps(context.instance, context.run)
    if steps is None:
        return None
    return {(tags[RECIPE], tags[DIGEST]) for tags in steps.values() if DIGEST in tags}


def _tags_of_steps(
    instance: dg.DagsterInstance, run: dg.DagsterRun
) -> dict[str, Mapping[str, str]] | None:
    """Name of each step that a run executes → its tags; None where Dagster kept no plan of it."""
    if run.execution_plan_snapshot_id is None:
        return None
    plan = instance.get_execution_plan_snapshot(run.execution_plan_snapshot_id)
    executed = plan.step_keys_to_execute
    return {step.key: step.tags or {} for step in plan.steps if step.key in executed}


@dataclass(frozen=True)
class Ours:
    """What of a run is ours: in a team's Dagster there are runs of others, and of assets of both.

    Attributes:
        recipes: names of the recipes that the run has steps of, sorted.
        steps: names of its steps that are ours.
        all: whether all of its steps are.
    """

    recipes: Sequence[str]
    steps: frozenset[str]
    all: bool


def ours_of(instance: dg.DagsterInstance, run: dg.DagsterRun) -> Ours:
    """What of a run is ours, by the tags that its steps had when it was launched."""
    steps = _tags_of_steps(instance, run) or {}
    own = {n for n, tags in steps.items() if RECIPE in tags or OWN.items() <= tags.items()}
    recipes = sorted({tags[RECIPE] for tags in steps.values() if RECIPE in tags})
    return Ours(recipes, frozenset(own), bool(own) and len(own) == len(steps))


def _digest_of(recipe: Recipe) -> str:
    """Digest of what a recipe makes a run do."""
    beside = {"description", "retrain", "tags", "retries"}
    options = recipe.options.model_dump(mode="json", exclude=beside)
    if recipe.options.retrain is not None and recipe.options.retrain.warm_start:
        options["warm_start"] = True
    return short_digest({"parameters": recipe.config.model_dump(mode="json"), "options": options})
