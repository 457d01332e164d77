"""Skips the work of an asset whose inputs and outputs are unchanged since its last materialization.

Each materialization is tagged with a digest of all that its step read and left behind (`SEEN`). If
the digest is still the same, the step returns its last result instead of doing its work.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import dagster as dg
from dagster._core.storage.asset_check_execution_record import AssetCheckExecutionRecordStatus

from assets.launched import CODE_VERSION, Launched

if TYPE_CHECKING:
    from diffsynth_dagster.config.entries import ModelEntry
    from diffsynth_dagster.run.file_states import Read, Step

_Found = TypeVar("_Found")
SEEN = "diffsynth/seen"
"""Tag of a materialization: digest of what its step read and left behind."""
_DATA_VERSION = "dagster/data_version"
_OF_THAT_RUN = ("trained_because", "resumed_after_step", "moved_to", "overrides")
"""Metadata about the run that made the asset, which a skipped step does not repeat."""


@dataclass(frozen=True)
class Look:
    """A look at the inputs of a step, taken before the step does anything.

    Attributes:
        read: the inputs; None if they cannot be determined.
        again: looks at the inputs once more.
        left: returns a digest of the step's output files; raises `NotTheSame` if they are gone.
        tags: tags of the materialization: see `Launched.tags`.
        facts: metadata of the materialization: see `Launched.facts`.
    """

    context: dg.AssetExecutionContext
    read: "Read | None"
    again: "Callable[[], Read]"
    left: Callable[[], str]
    tags: Mapping[str, str]
    facts: Mapping[str, dg.MetadataValue]

    @property
    def marked(self) -> Mapping[str, str]:
        """The tags of a materialization after the step's work, `SEEN` included. Only for one whose
        checks passed: a failed check must be repeated."""
        # FileReport at again: if an input changed while the step worked, nobody knows which one it
        # read. (Files that the step itself made, such as downloads, may have been added.)
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
        """The result of the last materialization, if the step's inputs and outputs are unchanged
        and its checks passed; else None."""
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
        """The check results of an earlier run, to be reported again; None unless all passed.

        Args:
            run: id of the earlier run.
        """
        storage = self.context.instance.event_log_storage
        results: list[dg.AssetCheckResult] = []
        for spec in self.context.assets_def.check_specs:
            found = storage.get_asset_check_execution_history(
                spec.key, limit=1, status={AssetCheckExecutionRecordStatus.SUCCEEDED}
            )
            event = found[0].event if found else None
            # A check that another run evaluated may be about other files.
            if event is None or event.run_id != run or event.dagster_event is None:
                return None
            evaluation: Any = event.dagster_event.event_specific_data
            results.append(
                dg.AssetCheckResult(
                    check_name=spec.name,
                    passed=True,
                    description=evaluation.description,
                    metadata=evaluation.metadata,
                )
            )
        return results


def _shown(metadata: Any) -> dict[str, Any]:
    """The last metadata, changed to say that this run encoded and trained nothing."""
    kept = {name: value for name, value in metadata.items() if name not in _OF_THAT_RUN}
    if "trained_in_this_run" in kept:
        kept["trained_in_this_run"] = dg.MetadataValue.bool(False)
    # What had to be encoded the last time is in the store now: misses become hits.
    for name in [name for name in kept if name.startswith("misses/")]:
        hits = name.replace("misses/", "hits/")
        kept[hits] = dg.MetadataValue.int(kept[hits].value + kept[name].value)
        kept[name] = dg.MetadataValue.int(0)
    return kept


def look(
    context: dg.AssetExecutionContext, step: "Step", ran: Launched, beside: object = None
) -> Look:
    """Look at the inputs of a step of a recipe.

    Args:
        beside: a JSON value that counts as an input too, beside the parameters and files.
    """
    from diffsynth_dagster.run.file_states import digest_left, look_at

    def read() -> "Read":
        return look_at(step, ran.config, beside)

    left = partial(digest_left, step, ran.config)
    return Look(context, _known(read), read, left, ran.tags(step), ran.facts)


def look_at_weights(context: dg.AssetExecutionContext, entry: "ModelEntry", code: str) -> Look:
    """Look at the files of a weights asset.

    Args:
        code: the code version of the asset.
    """
    from diffsynth_dagster.run.file_states import look_at_model

    read = partial(look_at_model, entry)
    return Look(context, read(), read, lambda: "", {CODE_VERSION: code}, {})


def _known(function: Callable[[], _Found]) -> _Found | None:
    """What a function returns; None if it raises `NotTheSame`."""
    from diffsynth_dagster.run.file_states import NotTheSame

    try:
        return function()
    except NotTheSame:
        return None
