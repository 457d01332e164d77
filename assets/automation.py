"""When assets are made anew by themselves: the conditions of recipes with `retrain: {cron: …}`.

A night goes like this. At the time of the cron the files of the data set are listed (`<recipe>/data`).
When that is done, each asset is asked for that is due: something that it depends on has changed since it
was made. The metadata alone first, since that finds out whether the rows have changed at all; then what is
left in one run, from the first asset that is due to the last. An asset waits while anything before it is
being made; its night ends when nothing is, or when it was asked for. So what is changed by day waits for the next night.

Due is what was not made since the change, not what was not asked for: after a night that failed or was
cancelled the next one tries again.
"""

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from itertools import islice, pairwise

import dagster as dg

from assets.common import Kind, asset_key, kinds_of
from assets.data import data_key
from assets.prefix import Prefix
from assets.weights import GROUP, weights_keys
from diffsynth_dagster.config import Recipe
from diffsynth_dagster.config.retrain import Retrain

AC = dg.AutomationCondition
Condition = dg.AutomationCondition[dg.AssetKey]
_BY_ITSELF = {"dagster/from_automation_condition": "true"}
"""What Dagster tags the runs with that conditions have asked for."""
_TICKS = 30


def with_automation(
    assets: Sequence[dg.AssetsDefinition],
    recipes: Sequence[Recipe],
    prefix: Prefix = Prefix(),  # noqa: B008 - it does not change
) -> list[dg.AssetsDefinition]:
    """The assets, those of recipes with `retrain` with their conditions and freshness policies.

    Args:
        prefix: of the assets' keys.
    """
    conditions = {prefix.key(k): found for k, found in _conditions(recipes, prefix).items()}
    policies = {prefix.key(k): found for k, found in _policies(recipes).items()}

    def automated(spec: dg.AssetSpec) -> dg.AssetSpec:
        if spec.key in conditions:
            spec = spec.replace_attributes(automation_condition=conditions[spec.key])
        if spec.key in policies:
            spec = spec.replace_attributes(freshness_policy=policies[spec.key])
        return spec

    if not conditions and not policies:
        return list(assets)
    return list(dg.map_asset_specs(automated, assets))


def _conditions(recipes: Sequence[Recipe], prefix: Prefix) -> dict[dg.AssetKey, Condition]:
    """Asset, by its key without the prefix → its condition, of the recipes of which what has changed is made
    anew each night."""
    found: dict[dg.AssetKey, Condition] = {}
    ticks: dict[dg.AssetKey, Condition] = {}
    for recipe in recipes:
        retrain = recipe.options.retrain
        if retrain is None or not retrain.nightly:
            continue
        tick, data = _tick(retrain), data_key(recipe)
        if data is not None:
            found[data] = tick & ~AC.in_progress()
        for kind in kinds_of(recipe.config):
            found[asset_key(recipe.name, kind)] = _own(recipe, kind, tick, prefix)
        for key in weights_keys(recipe):
            ticks[key] = ticks[key] | tick if key in ticks else tick
    return {**found, **{key: _weights(tick) for key, tick in ticks.items()}}


def own_keys(recipe: Recipe) -> list[dg.AssetKey]:
    """The assets that a recipe has of its own, that of its files among them."""
    data = data_key(recipe)
    kinds = [asset_key(recipe.name, kind) for kind in kinds_of(recipe.config)]
    return kinds if data is None else [data, *kinds]


def _tick(retrain: Retrain) -> Condition:
    assert retrain.cron is not None, "it is nightly"
    return AC.cron_tick_passed(retrain.cron, retrain.timezone)


def _own(recipe: Recipe, kind: Kind, tick: Condition, prefix: Prefix) -> Condition:
    """The condition of an asset that a recipe has of its own."""
    kinds, listed = kinds_of(recipe.config), data_key(recipe)
    data = None if listed is None else prefix.key(listed)
    before = kinds[: kinds.index(kind)]
    begin = tick
    if data is not None:
        # Only where a condition asked for it: a run of a person's begins no night.
        asked = AC.newly_updated() & AC.executed_with_tags(tag_values=_BY_ITSELF)
        begin = AC.asset_matches(data, asked)
    makes_data = kind == "metadata" and recipe.config.customized_dataset is not None
    keys = [prefix.key(asset_key(recipe.name, each)) for each in kinds]
    earlier = keys[: len(before)]
    idle = ~_busy(keys, earlier, data, prefix)
    ended = ~idle.newly_true() & idle & ~begin
    night = begin.since(ended | AC.newly_requested()).with_label("the night goes on")
    # An export that is refused is no better the next night.
    due = _due(begin if makes_data else None, refused=kind != "promoted")
    ours = dg.AssetSelection.assets(*keys) | dg.AssetSelection.groups(prefix.name(GROUP))
    # What others make may lie there all the same, made without this Dagster.
    missing = AC.any_deps_match(AC.missing() & ~AC.will_be_requested()).allow(ours)
    condition = night & idle & due & ~missing
    for each in earlier:
        condition = condition & ~AC.asset_matches(each, _failed())
    if before and before[-1] != "metadata":
        asked = AC.asset_matches(earlier[-1], AC.will_be_requested())
        together = asked & ~AC.in_progress() & ~_waits_for_others(data, prefix)
        condition = condition | together.with_label("together with the asset before it")
    return condition


def _busy(
    keys: Sequence[dg.AssetKey],
    before: Sequence[dg.AssetKey],
    data: dg.AssetKey | None,
    prefix: Prefix,
) -> Condition:
    """Whether something is being made that an asset waits for: all that writes into the recipe's run
    folder, and what lies before it.

    Args:
        keys: the assets of the recipe, but for its data.
        before: those of them that lie before the asset.
        data: see `_waits_for_others`.
    """
    busy = AC.in_progress() | _waits_for_others(data, prefix)
    for key in keys:
        busy = busy | AC.asset_matches(key, AC.in_progress())
    for key in before:
        busy = busy | AC.asset_matches(key, AC.will_be_requested())
    return busy.with_label("something before it, or in its run folder, is being made")


def _waits_for_others(data: dg.AssetKey | None, prefix: Prefix) -> Condition:
    """Whether assets upstream are being made, or weights are missing, which have a sensor of their own.

    Args:
        data: of the recipe. Its end begins the night: that it is made once more holds nothing up.
    """
    weights = dg.AssetSelection.groups(prefix.name(GROUP))
    making = AC.any_deps_match(AC.in_progress())
    if data is not None:
        making = making.ignore(dg.AssetSelection.assets(data))
    return making | AC.any_deps_match(AC.missing()).allow(weights)


def _due(also: Condition | None, refused: bool) -> Condition:
    """Whether an asset was not made since something that it depends on changed.

    Args:
        also: what else it is due by.
        refused: whether it is due as long as a check of it blocks.
    """
    changed = AC.missing() | AC.code_version_changed() | AC.initial_evaluation()
    changed = changed | AC.any_deps_match(AC.data_version_changed())
    if also is not None:
        changed = changed | also
    # A run that was under way when the recipe was edited made it with what was before.
    late = (AC.code_version_changed() & AC.in_progress()).since(AC.newly_requested())
    changed = changed | (late & AC.newly_requested())
    due = changed.since(AC.newly_updated()) | late | AC.execution_failed()
    return (due | _refused() if refused else due).with_label("changed since it was made")


def _refused() -> Condition:
    """Whether a check of the asset said that it must not be used."""
    return AC.any_checks_match(AC.check_failed(), blocking_only=True)


def _failed() -> Condition:
    """Whether the last attempt at an asset failed."""
    return AC.execution_failed() | _refused()


def _weights(tick: Condition) -> Condition:
    """The condition of a model's files.

    Args:
        tick: the times of all recipes that use them.
    """
    changed = (
        AC.missing() | AC.code_version_changed() | AC.any_deps_match(AC.data_version_changed())
    )
    due = changed.since(AC.newly_updated()).with_label("changed since it was made")
    asked = AC.newly_requested() | AC.newly_updated() | AC.initial_evaluation()
    return tick.since(asked) & due & ~AC.in_progress() & ~AC.any_deps_in_progress()


def _policies(recipes: Sequence[Recipe]) -> dict[dg.AssetKey, dg.FreshnessPolicy]:
    """Asset → how old it may be, of what is trained at every time of a cron."""
    found: dict[dg.AssetKey, dg.FreshnessPolicy] = {}
    for recipe in recipes:
        retrain = recipe.options.retrain
        if retrain is None or retrain.when != "always":
            continue
        policy = freshness(retrain)
        for kind in kinds_of(recipe.config):
            if kind not in ("metadata", "latents"):
                found[asset_key(recipe.name, kind)] = policy
    return found


def freshness(retrain: Retrain) -> dg.FreshnessPolicy:
    """How old a training may be that is made anew at each time of a cron: made since the time before.
    Where these are not evenly spaced: twice the longest time between two."""
    from dagster._utils.schedules import cron_string_iterator

    assert retrain.cron is not None, "it is always retrained"
    now = datetime.now(UTC).timestamp()
    times = list(islice(cron_string_iterator(now, retrain.cron, retrain.timezone), _TICKS))
    gaps = [after - before for before, after in pairwise(times)]
    if max(gaps) == min(gaps):
        return dg.FreshnessPolicy.cron(retrain.cron, gaps[0], retrain.timezone)
    return dg.FreshnessPolicy.time_window(fail_window=max(max(gaps) * 2, timedelta(minutes=1)))
