"""An asset that would only make again what it made: said at once, from what Dagster knows of the last time."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import dagster as dg
from dagster._core.storage.asset_check_execution_record import AssetCheckExecutionRecordStatus

from assets.launched import Launched

if TYPE_CHECKING:
    from diffsynth_dagster.config.entries import ModelEntry
    from diffsynth_dagster.run.seen import Step

SEEN = "diffsynth/seen"
"""Tag of a materialization: what its step read, and what it left."""
_VERSION, _CODE = "dagster/data_version", "dagster/code_version"
_OF_THAT_RUN = ("trained_because", "resumed_after_step", "moved_to")
"""Metadata that is about the run that made the asset."""


@dataclass(frozen=True)
class Look:
    """What a step goes by, looked at before it does anything.

    Attributes:
        read: digest of that; None where some of it is not there.
        left: digest of what the step leaves; raises `NotTheSame` where that is not there.
        tags: of a materialization: see `Launched.tags`.
    """

    context: dg.AssetExecutionContext
    read: str | None
    left: Callable[[], str]
    tags: dict[str, str]

    @property
    def marked(self) -> dict[str, str]:
        """The tags of a materialization after the step's work, which say what it read and left. For one
        whose checks have passed."""
        from diffsynth_dagster.facts import digest_of
        from diffsynth_dagster.run.seen import NotTheSame

        if self.read is None:
            return self.tags
        try:
            return {**self.tags, SEEN: digest_of([self.read, self.left()])[:32]}
        except NotTheSame:
            return self.tags

    def unchanged(self) -> dg.MaterializeResult | None:
        """The result of the last time, if all that was read and left is as it was, and its checks passed."""
        event = self.context.instance.get_latest_materialization_event(self.context.asset_key)
        made = None if event is None else event.asset_materialization
        if event is None or made is None:
            return None
        before, now = made.tags or {}, self.marked
        if SEEN not in now or any(before.get(tag) != now[tag] for tag in (SEEN, _CODE)):
            return None
        checks = self._checks(event.run_id)
        if checks is None:
            return None
        why = "unchanged, because its parameters and files are what they were"
        self.context.log.info(why)
        return dg.MaterializeResult(
            metadata={**_shown(made.metadata), "unchanged": why},
            data_version=dg.DataVersion(before[_VERSION]),
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
    from diffsynth_dagster.run.seen import digest_left, digest_read

    return Look(
        context,
        _known(lambda: digest_read(step, ran.config, beside)),
        lambda: digest_left(step, ran.config),
        ran.tags(step),
    )


def look_at_model(context: dg.AssetExecutionContext, entry: "ModelEntry", code: str) -> Look:
    """What the step of a model goes by.

    Args:
        code: the code version of its asset.
    """
    from diffsynth_dagster.run.seen import digest_model

    return Look(context, _known(lambda: digest_model(entry)), lambda: "", {_CODE: code})


def _known(digest: Callable[[], str]) -> str | None:
    from diffsynth_dagster.run.seen import NotTheSame

    try:
        return digest()
    except NotTheSame:
        return None
