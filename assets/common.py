"""What all assets share: how errors end a step, and what makes an asset stale."""

import hashlib
import json
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from pathlib import Path

import dagster as dg

from diffsynth_dagster import __version__
from diffsynth_dagster.config import Recipe, TrainingConfig
from diffsynth_dagster.config.effect import effect, named_values
from diffsynth_dagster.errors import DownloadError, UserError

GPU_POOL = "gpu"


@contextmanager
def user_errors() -> Generator[None]:
    """A mistake that a person can mend fails the step with its message, and is not tried again
    (but for a download, which the network may have broken)."""
    try:
        yield
    except UserError as error:
        retry = isinstance(error, DownloadError)
        raise dg.Failure(description=str(error), allow_retries=retry) from None


def asset_key(kind: str, recipe: str) -> dg.AssetKey:
    """Key of a recipe's asset: `metadata/demo`."""
    return dg.AssetKey([kind, recipe])


def code_version(config: TrainingConfig, parameters: Iterable[str] | None = None) -> str:
    """Digest of parameters: an asset whose digest changed is stale.

    Args:
        parameters: those that the asset depends on; all that affect a training when left out.
    """
    values = named_values(config)
    chosen = effect(config) if parameters is None else {n: values[n] for n in parameters}
    text = json.dumps([__version__, chosen], sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def description(recipe: Recipe, what: str) -> str:
    """What an asset is, and what its recipe is for."""
    return f"{what}\n\n{recipe.options.description}".strip()


def book_path(config: TrainingConfig) -> Path:
    """Where facts about files are remembered; shared with the training processes."""
    return Path(config.cache_path) / "facts.sqlite"


def table(records: Iterable[dict[str, str | int | float]]) -> dg.TableMetadataValue:
    """Rows as a table in the UI."""
    return dg.MetadataValue.table([dg.TableRecord(record) for record in records])
