"""Automation conditions of recipes with `retrain: {cron: …}`: which assets are remade each night.

A night runs in this order:

1. When the cron fires, `<recipe>/data` lists the files of the data set.
2. Then `<recipe>/metadata` is requested if it is due. It runs alone, because it finds out whether
   the rows have changed at all.
3. Then one run makes everything else that is due, from the first due asset to the last.

An asset is due when something that it depends on has changed since it was made. It is still due
after a night that failed or was cancelled, so the next night tries again.

An asset waits while anything upstream of it is being made. Its night ends when it is requested, or
when nothing upstream is being made any more. So a change during the day waits for the next night.
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
"""Dagster's tag on runs that automation conditions requested."""
_TICKS = 30
"""Times of a cron that are looked at to find the longest gap between two."""


def with_automation(
    assets: Sequence[dg.AssetsDefinition],
    recipes: Sequence[Recipe],
    prefix: Prefix = Prefix(),  # noqa: B008 - it does not change
) -> list[dg.AssetsDefinition]:
    """The assets, with conditions and freshness policies added to those of recipes with `retrain`.

    Args:
        prefix: the prefix that the keys of `assets` already have.
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
    """Asset key without the prefix → condition, for the recipes that are retrained nightly."""
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
            found[asset_key(recipe.name, kind)] = _recipe_asset(recipe, kind, tick, prefix)
        # Recipes share weights: these are due at the times of every recipe that uses them.
        for key in weights_keys(recipe):
            ticks[key] = ticks[key] | tick if key in ticks else tick
    return {**found, **{key: _weights(tick) for key, tick in ticks.items()}}


def own_keys(recipe: Recipe) -> list[dg.AssetKey]:
    """The assets that belong to this recipe alone, `<recipe>/data` included; not the weights."""
    data = data_key(recipe)
    kinds = [asset_key(recipe.name, kind) for kind in kinds_of(recipe.config)]
    return kinds if data is None else [data, *kinds]


def _tick(retrain: Retrain) -> Condition:
    assert retrain.cron is not None, "a nightly recipe has a cron"
    return AC.cron_tick_passed(retrain.cron, retrain.timezone)


def _recipe_asset(recipe: Recipe, kind: Kind, tick: Condition, prefix: Prefix) -> Condition:
    """The condition of one asset of a recipe (not of its data or weights).

    Args:
        tick: true when the recipe's cron has fired.
    """
    kinds, listed = kinds_of(recipe.config), data_key(recipe)
    data = None if listed is None else prefix.key(listed)
    before = kinds[: kinds.index(kind)]
    begin = tick
    if data is not None:
        # Only a listing that the cron requested begins a night. One that a person runs does not.
        listed_by_cron = AC.newly_updated() & AC.executed_with_tags(tag_values=_BY_ITSELF)
        begin = AC.asset_matches(data, listed_by_cron)
    makes_data = kind == "metadata" and recipe.config.customized_dataset is not None
    keys = [prefix.key(asset_key(recipe.name, other)) for other in kinds]
    earlier = keys[: len(before)]
    idle = ~_busy(keys, earlier, data, prefix)
    # On the first idle tick the asset can still be requested. The night ends after that tick.
    ended = ~idle.newly_true() & idle & ~begin
    night = begin.since(ended | AC.newly_requested()).with_label("the night goes on")
    # `promoted` is not tried again after a refusal: the same export is no better the next night.
    # `customized_dataset` may change the files at any time, so such metadata is due every night.
    due = _due(begin if makes_data else None, refused=kind != "promoted")
    ours = dg.AssetSelection.assets(*keys) | dg.AssetSelection.groups(prefix.name(GROUP))
    # Files of other recipes may exist although this Dagster never made them. So only a missing
    # asset of this recipe, or of weights, holds the asset up.
    missing = AC.any_deps_match(AC.missing() & ~AC.will_be_requested()).allow(ours)
    condition = night & idle & due & ~missing
    for key in earlier:
        condition = condition & ~AC.asset_matches(key, _failed())
    # Everything after the latents follows the asset before it into the same run. The latents do
    # not: whether they are due is known only when the metadata is done.
    if before and before[-1] != "metadata":
        requested = AC.asset_matches(earlier[-1], AC.will_be_requested())
        together = requested & ~AC.in_progress() & ~_waits_for_others(data, prefix)
        condition = condition | together.with_label("together with the asset before it")
    return condition


def _busy(
    keys: Sequence[dg.AssetKey],
    before: Sequence[dg.AssetKey],
    data: dg.AssetKey | None,
    prefix: Prefix,
) -> Condition:
    """True while something that the asset waits for is being made: any asset that writes into the
    recipe's run folder, or an asset upstream.

    Args:
        keys: the assets of the recipe, without its data.
        before: the ones among them that are upstream of the asset.
        data: see `_waits_for_others`.
    """
    busy = AC.in_progress() | _waits_for_others(data, prefix)
    for key in keys:
        busy = busy | AC.asset_matches(key, AC.in_progress())
    for key in before:
        busy = busy | AC.asset_matches(key, AC.will_be_requested())
    return busy.with_label("something before it, or in its run folder, is being made")


def _waits_for_others(data: dg.AssetKey | None, prefix: Prefix) -> Condition:
    """True while assets upstream are being made, or weights are missing. (Weights have their own
    sensor, which makes them.)

    Args:
        data: key of the recipe's data, which is not waited for: its end is what begins the night.
    """
    weights = dg.AssetSelection.groups(prefix.name(GROUP))
    making = AC.any_deps_match(AC.in_progress())
    if data is not None:
        making = making.ignore(dg.AssetSelection.assets(data))
    return making | AC.any_deps_match(AC.missing()).allow(weights)


def _due(also: Condition | None, refused: bool) -> Condition:
    """True if something that the asset depends on has changed since the asset was made.

    Args:
        also: one more condition that makes it due.
        refused: whether it stays due as long as one of its blocking checks fails.
    """
    # At the first evaluation nothing is known of earlier changes, so the asset counts as changed.
    changed = AC.missing() | AC.code_version_changed() | AC.initial_evaluation()
    changed = changed | AC.any_deps_match(AC.data_version_changed())
    if also is not None:
        changed = changed | also
    # The recipe was edited while a run was making the asset: that run used the old recipe, so its
    # end does not count as an update.
    late = (AC.code_version_changed() & AC.in_progress()).since(AC.newly_requested())
    changed = changed | (late & AC.newly_requested())
    due = changed.since(AC.newly_updated()) | late | AC.execution_failed()
    return (due | _refused() if refused else due).with_label("changed since it was made")


def _refused() -> Condition:
    """True if a blocking check of the asset failed."""
    return AC.any_checks_match(AC.check_failed(), blocking_only=True)


def _failed() -> Condition:
    """True if the last run of the asset failed, or one of its blocking checks did."""
    return AC.execution_failed() | _refused()


def _weights(tick: Condition) -> Condition:
    """The condition of a weights asset.

    Args:
        tick: true when the cron of any recipe that uses the weights has fired.
    """
    changed = (
        AC.missing() | AC.code_version_changed() | AC.any_deps_match(AC.data_version_changed())
    )
    due = changed.since(AC.newly_updated()).with_label("changed since it was made")
    handled = AC.newly_requested() | AC.newly_updated() | AC.initial_evaluation()
    return tick.since(handled) & due & ~AC.in_progress() & ~AC.any_deps_in_progress()


def _policies(recipes: Sequence[Recipe]) -> dict[dg.AssetKey, dg.FreshnessPolicy]:
    """Asset key → how old the asset may be, for recipes with `when: always`."""
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
    """How old a training with `when: always` may be.

    With an evenly spaced cron it must be newer than the last time of the cron. Otherwise it may be
    twice as old as the longest gap between two times.
    """
    from dagster._utils.schedules import cron_string_iterator

    assert retrain.cron is not None, "'when: always' needs a cron"
    now = datetime.now(UTC).timestamp()
    times = list(islice(cron_string_iterator(now, retrain.cron, retrain.timezone), _TICKS))
    gaps = [after - before for before, after in pairwise(times)]
    # Dagster's cron policy takes one deadline, which fits only equal gaps (not "0 3 * * 1,2").
    if max(gaps) == min(gaps):
        return dg.FreshnessPolicy.cron(retrain.cron, gaps[0], retrain.timezone)
    return dg.FreshnessPolicy.time_window(fail_window=max(max(gaps) * 2, timedelta(minutes=1)))
