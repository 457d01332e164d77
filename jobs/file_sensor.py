"""`files_<recipe>`: the sensor that trains again when files of the data set have changed."""

import json
import time
from collections.abc import Set
from dataclasses import asdict, dataclass

import dagster as dg

from assets.automation import own_keys
from assets.prefix import Prefix
from diffsynth_dagster.config import Recipe
from diffsynth_dagster.config.retrain import Retrain
from jobs.training import job_name

_INTERVAL_S = 60
_UNDER_WAY = [
    *(dg.DagsterRunStatus.QUEUED, dg.DagsterRunStatus.NOT_STARTED, dg.DagsterRunStatus.STARTING),
    *(dg.DagsterRunStatus.STARTED, dg.DagsterRunStatus.CANCELING),
]


@dataclass(frozen=True)
class Watched:
    """What the sensor remembers from tick to tick, as its cursor.

    Attributes:
        asked: digest of the files for which a run was last requested.
        seen: digest of the files at the last tick.
        since: time of the first tick that saw this digest, in seconds since 1970.
    """

    asked: str
    seen: str
    since: float


def make_files_sensor(recipe: Recipe, retrain: Retrain, prefix: Prefix) -> dg.SensorDefinition:
    """The sensor of a recipe with `retrain: {files: true}`. Its first tick only notes the files."""
    job, keys = prefix.name(job_name(recipe.name)), set(map(prefix.key, own_keys(recipe)))

    @dg.sensor(
        name=prefix.name(f"files_{recipe.name}"),
        job_name=job,
        minimum_interval_seconds=_INTERVAL_S,
        default_status=dg.DefaultSensorStatus.RUNNING,
        description="Trains again when files of the data set were added, changed or removed, and then lay "
        f"still for {retrain.settle_minutes:g} minutes.",
    )
    def files(context: dg.SensorEvaluationContext) -> dg.SensorResult:
        from diffsynth_dagster.data.listing import list_data

        listing, now = list_data(recipe.config), time.time()
        if context.cursor is None:
            watched = Watched(listing.digest, listing.digest, now)
            return _wait(watched, f"it knows the {listing.files} files now, and waits for a change")
        watched = Watched(**json.loads(context.cursor))
        # Another change begins the wait anew: files are still being copied.
        if listing.digest != watched.seen:
            watched = Watched(watched.asked, listing.digest, now)
        # Also when files changed and changed back before the wait was over.
        if watched.seen == watched.asked:
            return _wait(watched, f"nothing has changed in {listing.files} files")
        left = watched.since + 60 * retrain.settle_minutes - now
        if left > 0:
            return _wait(
                watched, f"files have changed: waits until they have lain still {left:.0f} s more"
            )
        run = under_way(context.instance, job, keys)
        if run is not None:
            return _wait(
                watched, f"files have changed: waits for the run {run}, which makes this recipe"
            )
        asked = Watched(watched.seen, watched.seen, watched.since)
        # Dagster ignores a run key that it has seen before. The time makes it new when files return
        # to an earlier state.
        request = dg.RunRequest(run_key=f"{watched.seen} {watched.since:.0f}")
        return dg.SensorResult(run_requests=[request], cursor=json.dumps(asdict(asked)))

    return files


def _wait(watched: Watched, why: str) -> dg.SensorResult:
    return dg.SensorResult(skip_reason=why, cursor=json.dumps(asdict(watched)))


def under_way(
    instance: dg.DagsterInstance, job: str, keys: Set[dg.AssetKey] = frozenset()
) -> str | None:
    """Id of an unfinished run that makes a recipe's assets; None if there is none.

    Args:
        job: the recipe's job.
        keys: assets of the recipe, to also find runs of picked assets and of automation conditions.
    """
    for run in instance.get_runs(filters=dg.RunsFilter(statuses=_UNDER_WAY)):
        if run.job_name == job or keys & (run.asset_selection or set()):
            return run.run_id
    return None
