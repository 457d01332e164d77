"""Shared by all assets: asset keys, code versions, and how errors end a step."""

import hashlib
import json
import math
from collections.abc import Generator, Iterable, Mapping
from contextlib import contextmanager
from typing import Any, Literal, get_args

import dagster as dg

from diffsynth_dagster.config import Recipe, TrainingConfig
from diffsynth_dagster.config.affects import Affects, names_that_affect, values_that_affect
from diffsynth_dagster.run.failure import failure_of, recognised
from diffsynth_dagster.versions import VERSIONS
from resources import Cancelled, StepFailure, TriedAgain, cancelled

RETRY_DELAY_S = 5.0
"""Seconds before a step is tried again. A GPU that was lost may be back by then."""
Kind = Literal["metadata", "latents", "checkpoints", "exports", "promoted"]
KINDS: tuple[Kind, ...] = get_args(Kind)
"""The assets of a recipe, upstream first."""


@contextmanager
def user_errors(config: TrainingConfig | None = None) -> Generator[None]:
    """Turn every error in the block into one that shows its reason first: a user's mistake without
    a traceback, a crash with one, or a cancel. See `resources.failing`.

    A mistake is not retried, except for a failed download, because the network may be back.

    Args:
        config: the config of the processes that the block runs, if any. The message of a cancel
            then says from which state they continue.
    """
    try:
        yield
    except (StepFailure, Cancelled):
        raise  # from an inner block: it has its words already
    except (KeyboardInterrupt, dg.DagsterExecutionInterruptedError):
        raise cancelled(config) from None
    # Broad, but nothing goes on: the error is only given its words.
    except Exception as error:
        raise StepFailure.of(failure_of(recognised(error))) from error


def require_passed(result: dg.MaterializeResult) -> None:
    """Fail the step if a blocking check failed. Called after the result was yielded to Dagster.

    Dagster would fail the step too, but without the reason.

    Raises:
        StepFailure: a check failed; it has the check's description.
    """
    for check in result.check_results or ():
        if not check.passed:
            raise StepFailure(check.description or "")


@contextmanager
def tried_again(
    context: dg.AssetExecutionContext, times: int, delay: float = RETRY_DELAY_S
) -> Generator[None]:
    """Let Dagster retry the step after a crash. Must be the outer one of this and `user_errors`.

    This is not a `RetryPolicy`, because Dagster would then also retry a step that was cancelled.

    Args:
        times: retries at most.
        delay: seconds before a retry.

    Raises:
        TriedAgain: the step is to be retried.
        StepFailure: retrying cannot help, or all retries are used up.
    """
    try:
        yield
    except StepFailure as failure:
        if not failure.allow_retries or context.retry_number >= times:
            raise
        raise TriedAgain(failure, times, delay) from failure


def asset_key(recipe: str, kind: Kind | Literal["data"]) -> dg.AssetKey:
    """Key of a recipe's asset: `demo/metadata`. The UI shows the last part as the asset's title."""
    return dg.AssetKey([recipe, kind])


def kinds_of(config: TrainingConfig) -> tuple[Kind, ...]:
    """The assets of a recipe, upstream first.

    A recipe that only encodes (`task: sft:data_process`) ends with its latents. A recipe that
    trains from an encoded folder (no `dataset_metadata_path`) starts with its checkpoints.
    """
    encodes, trains = config.dataset_metadata_path is not None, not config.encodes_only
    return (*(KINDS[:2] if encodes else ()), *(KINDS[2:] if trains else ()))


_BY_VALUE: dict[Kind, tuple[Affects, ...]] = {
    "metadata": ("weights", "rows"),
    "latents": ("weights", "rows", "latents"),
    "checkpoints": ("weights", "rows", "latents", "training"),
    "exports": ("exports",),
    "promoted": (),
}
_BY_NAME: dict[Kind, tuple[Affects, ...]] = {
    "metadata": ("weights", "rows"),  # The model list decides which columns there are.
    "latents": ("latents",),
    "checkpoints": ("latents", "training"),
    "exports": ("exports",),
    "promoted": (),
}
"""Marks whose by-content parameters enter a code version by file name.

A parameter that counts by content usually needs no place in a code version: its content is in the
data version of an asset upstream. Weights are assets of their own, which latents and checkpoints
depend on, and the content of the rows is in the metadata. Where no asset upstream has the content,
the name of the file has to do. Checkpoints list "latents" too, since the latents asset does not
cover every file marked so: what only the denoiser uses is not encoded."""


def code_version(config: TrainingConfig, kind: Kind) -> str:
    """Digest of the parameters that an asset depends on. When it changes, the asset is stale."""
    names = _BY_NAME[kind]
    if kind == "checkpoints" and config.dataset_metadata_path is None:
        names = ("rows", *names)  # It reads an encoded folder: no asset upstream has its content.
    values = values_that_affect(config, *_BY_VALUE[kind])
    return short_digest([VERSIONS[kind], values, names_that_affect(config, *names)])


def short_digest(value: object) -> str:
    """A digest of a JSON value, 16 hexadecimal digits. The order of keys does not matter."""
    text = json.dumps(value, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def description(recipe: Recipe, what: str) -> str:
    """An asset's description for the UI: what it is, then the recipe's own description."""
    return f"{what}\n\n{recipe.options.description}".strip()


def number(value: float) -> dg.MetadataValue[Any]:
    """A number of four digits, which Dagster plots; NaN and infinity as text, which is not JSON."""
    if math.isfinite(value):
        return dg.MetadataValue.float(float(f"{value:.4g}"))
    return dg.MetadataValue.text(str(value))


def table(records: Iterable[Mapping[str, str | int | float]]) -> dg.TableMetadataValue:
    """Rows as a table in the UI."""
    return dg.MetadataValue.table([dg.TableRecord(dict(record)) for record in records])
