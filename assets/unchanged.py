"""An asset that would only make again what it made: said at once, from what Dagster knows of the last time."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import dagster as dg
from dagster._core.storage.asset_check_execution_record import AssetCheckExecutionRecordStatus

from assets.launched import CODE_VERSION, Launched

if TYPE_CHECKING:
    from diffsynth_dagster.config.entries import ModelEntry
    from diffsynth_dagster.run.seen import Read, Step

_Found = TypeVar("_Found")
SEEN = "diffsynth/seen"
"""Tag of a materialization: what its step read, and what it left."""
_DATA_VERSION = "dagster/data_version"
_OF_THAT_RUN = ("trained_because", "resumed_after_step", "moved_to", "overrides")
"""Metadata that is about the run that made the asset."""


@dataclass(frozen=True)
class Look:
    """What a step goes by, looked at before it does anything.

    Attributes:
        read: that; None where it is not known.
        again: looks once more.
        left: digest of what the step leaves; raises `NotTheSame` where that is not there.
        tags: of a materialization: see `Launched.tags`.
        facts: metadata of a materialization: see `Launched.facts`.
    """

    context: dg.AssetExecutionContext
    read: "Read | None"
    again: "Callable[[], Read]"
    left: Callable[[], str]
    tags: Mapping[str, str]
    facts: Mapping[str, dg.MetadataValue]

    @property
    def marked(self) -> Mapping[str, str]:
        """The tags of a materialization after the step's work, which say what it read and left. For one
        whose checks have passed."""
        read, now = self.read, _known(self.again)
        if read is None or now is None or not read.has_grown_to(now):
            return self.tags
        return self._marked(now)

    def _marked(self, read: "Read") -> Mapping[str, str]:
        from diffsynth_dagster.facts import digest_of

        left = _known(self.left)
        if left is None:
            return self.tags
        return {**self.tags, SEEN: digest_of([read.digest, left])[:32]}

    def unchanged(self) -> dg.MaterializeResult | None:
        """The result of the last time, if all that was read and left is as it was, and its checks passed."""
        event = self.context.instance.get_latest_materialization_event(self.context.asset_key)
        made = None if event is None else event.asset_materialization
        if event is None or made is None or self.read is None or SEEN not in (made.tags or {}):
            return None
        before, now = made.tags or {}, self._marked(self.read)
        if SEEN not in now or any(before.get(tag) != now[tag] for tag in (SEEN, CODE_VERSION)):
            return None
        checks = self._checks(event.run_id)
        if checks is None:
            return None
        why = "unchanged, because its parameters and files are what they were"
        self.context.log.info(why)
        return dg.MaterializeResult(
            metadata={**_shown(made.metadata), "unchanged": why, **self.facts},
            data_version=dg.DataVersion(before[_DATA_VERSION]),
            tags=now,
            check_results=checks,
        )

    def _checks(self, run: str) -> list[dg.AssetCheckResult] | None:
        """The results of the asset's checks in a run, as results of this one; None unless all passed."""
        storage = self.context.instance.event_log_storage
        results: list[dg.AssetCheckResult] = []
        for spec in self.context.assets_def.check_specs:
            found = storage.get_asset_check_execution_history(
                spec.key, limit=1, status={AssetCheckExecutionRecordStatus.SUCCEEDED}
            )
            event = found[0].event if found else None
            if event is None or event.run_id != run or event.dagster_event is None:
                return None
            said: Any = event.dagster_event.event_specific_data
            results.append(
                dg.AssetCheckResult(
                    check_name=spec.name,
                    passed=True,
                    description=said.description,
                    metadata=said.metadata,
                )
            )
        return results


def _shown(metadata: Any) -> dict[str, Any]:
    """The metadata of the last time, as this one's: nothing was encoded or trained."""
    kept = {name: value for name, value in metadata.items() if name not in _OF_THAT_RUN}
    if "trained_in_this_run" in kept:
        kept["trained_in_this_run"] = dg.MetadataValue.bool(False)
    for name in [name for name in kept if name.startswith("misses/")]:
        hits = name.replace("misses/", "hits/")
        kept[hits] = dg.MetadataValue.int(kept[hits].value + kept[name].value)
        kept[name] = dg.MetadataValue.int(0)
    return kept


def look(
    context: dg.AssetExecutionContext, step: "Step", ran: Launched, beside: object = None
) -> Look:
    """What a step of a recipe goes by.

    Args:
        beside: a JSON value that it goes by beside its parameters and files.
    """
    from diffsynth_dagster.run.seen import digest_left, look_at

    def read() -> "Read":
        return look_at(step, ran.config, beside)

    left = partial(digest_left, step, ran.config)
    return Look(context, _known(read), read, left, ran.tags(step), ran.facts)


def look_at_weights(context: dg.AssetExecutionContext, entry: "ModelEntry", code: str) -> Look:
    """What the step of a model goes by.

    Args:
        code: the code version of its asset.
    """
    from diffsynth_dagster.run.seen import look_at_model

    read = partial(look_at_model, entry)
    return Look(context, read(), read, lambda: "", {CODE_VERSION: code}, {})


def _known(find_out: Callable[[], _Found]) -> _Found | None:
    """What a function returns; None where that is not known."""
    from diffsynth_dagster.run.seen import NotTheSame

    try:
        return find_out()
    except NotTheSame:
        return None
