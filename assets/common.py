"""What all assets share: how errors end a step, and what makes an asset stale."""

import hashlib
import json
from collections.abc import Generator, Iterable, Mapping
from contextlib import contextmanager
from typing import Literal, get_args

import dagster as dg

from diffsynth_dagster.config import Recipe, TrainingConfig
from diffsynth_dagster.config.effect import Affects, names_that_affect, values_that_affect
from diffsynth_dagster.run.failure import failure_of, recognised
from diffsynth_dagster.versions import VERSIONS
from resources import Cancelled, StepFailure, TriedAgain, cancelled

RETRY_DELAY_S = 5.0
"""A GPU that was lost may be back."""
Kind = Literal["metadata", "latents", "checkpoints", "exports", "promoted"]
KINDS: tuple[Kind, ...] = get_args(Kind)
"""The assets that a recipe has of its own, in their order."""


@contextmanager
def user_errors(config: TrainingConfig | None = None) -> Generator[None]:
    """Let whatever ends a step end it with its reason first: a mistake that a person can mend, a
    crash with its traceback, a cancel. See `resources.failing`.

    A mistake is not tried again, except for a failed download: the network may have been the reason.

    Args:
        config: of the processes that the block runs: a cancel says where they go on.
    """
    try:
        yield
    except (StepFailure, Cancelled):
        raise
    except (KeyboardInterrupt, dg.DagsterExecutionInterruptedError):
        raise cancelled(config) from None
    except Exception as error:
        raise StepFailure.of(failure_of(recognised(error))) from error


def require_passed(check: dg.AssetCheckResult) -> None:
    """Fail the step of a check that blocks, after its result was given to Dagster, unless it passed.

    Dagster would do so too, without saying why.
    """
    if not check.passed:
        raise StepFailure(check.description or "")


@contextmanager
def tried_again(
    context: dg.AssetExecutionContext, times: int, delay: float = RETRY_DELAY_S
) -> Generator[None]:
    """Let Dagster try a step again after a crash. Entered outside of `user_errors`.

    Not by a retry policy: with one, Dagster tries a step that was cancelled again as well.

    Args:
        delay: before that, in seconds.
    """
    try:
        yield
    except StepFailure as failure:
        if not failure.allow_retries or context.retry_number >= times:
            raise
        raise TriedAgain(failure, times, delay) from failure


def asset_key(recipe: str, kind: Kind | Literal["data"]) -> dg.AssetKey:
    """Key of a recipe's asset: `demo/metadata`. The UI titles an asset by the last part."""
    return dg.AssetKey([recipe, kind])


def kinds_of(config: TrainingConfig) -> tuple[Kind, ...]:
    """The assets that a recipe has of its own.

    One that only encodes (`task: sft:data_process`) ends with its latents; one that trains from an
    encoded folder (no `dataset_metadata_path`) starts with its checkpoints.
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
    "metadata": ("weights", "rows"),  # The model list says which columns there are.
    "latents": ("latents",),
    "checkpoints": ("latents", "training"),
    "exports": ("exports",),
    "promoted": (),
}
"""Parameters that count by content enter a code version by the name of the file where no asset
upstream has its content in its data version. The content of weights is in their own assets, which
latents and checkpoints depend on; that of the rows is in the metadata. The latents do not hold all
that is marked so: what only the denoiser uses is not encoded."""


def code_version(config: TrainingConfig, kind: Kind) -> str:
    """Digest of the parameters that an asset depends on: when it changes, the asset is stale."""
    names = _BY_NAME[kind]
    if kind == "checkpoints" and config.dataset_metadata_path is None:
        names = ("rows", *names)  # An encoded folder: there is no asset upstream of it.
    values = values_that_affect(config, *_BY_VALUE[kind])
    return short_digest([VERSIONS[kind], values, names_that_affect(config, *names)])


def short_digest(value: object) -> str:
    """Sixteen digits that stand for a JSON value, whatever the order of its keys."""
    text = json.dumps(value, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def description(recipe: Recipe, what: str) -> str:
    """What an asset is, and what its recipe is for."""
    return f"{what}\n\n{recipe.options.description}".strip()


def table(records: Iterable[Mapping[str, str | int | float]]) -> dg.TableMetadataValue:
    """Rows as a table in the UI."""
    return dg.MetadataValue.table([dg.TableRecord(dict(record)) for record in records])
