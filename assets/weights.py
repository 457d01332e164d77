"""`weights/<repository or folder>/<component>`: the files of one entry of a model list."""

from collections.abc import Sequence
from contextlib import closing
from hashlib import blake2b
from math import prod
from pathlib import Path

import dagster as dg

from assets.common import RETRY_DELAY_S, fact_cache_path, table, tried_again, user_errors
from assets.lineage import Lineage
from diffsynth_dagster import __version__
from diffsynth_dagster.config import Recipe, TrainingConfig
from diffsynth_dagster.config.entries import (
    MODEL_FOLDERS,
    ModelEntry,
    folder_entries,
    model_entries,
)
from resources import Hub

GROUP = "weights"
_RETRIES = 3


class WeightsAssets:
    """One asset for each distinct entry of the recipes' model lists."""

    def __init__(self, recipes: Sequence[Recipe], lineage: Lineage) -> None:
        uses: dict[str, list[tuple[Recipe, ModelEntry]]] = {}
        for recipe in recipes:
            for entry in _entries(recipe.config):
                uses.setdefault(entry.text, []).append((recipe, entry))
        self._keys = _make_keys([users[0][1] for users in uses.values()])
        self.definitions = [
            _make_weights(self._keys[text], users[0][1], [recipe for recipe, _ in users], lineage)
            for text, users in uses.items()
        ]

    def keys(self, recipe: Recipe) -> list[dg.AssetKey]:
        """The weights that a recipe uses."""
        return [self._keys[entry.text] for entry in _entries(recipe.config)]


def _entries(config: TrainingConfig) -> list[ModelEntry]:
    return [*model_entries(config), *folder_entries(config)]


def _make_keys(entries: Sequence[ModelEntry]) -> dict[str, dg.AssetKey]:
    """Text of an entry → its key, such as `weights/Qwen-Image/transformer`.

    Entries whose keys would be equal, or equal as the names of Dagster's steps, get a mark.
    """
    alike: dict[str, list[tuple[ModelEntry, dg.AssetKey]]] = {}
    for entry in entries:
        key = dg.AssetKey([GROUP, *entry.short_name])
        alike.setdefault(key.to_python_identifier(), []).append((entry, key))
    return {
        entry.text: key
        if len(group) == 1
        else dg.AssetKey([*key.path[:-1], f"{key.path[-1]}_{_mark(entry.text)}"])
        for group in alike.values()
        for entry, key in group
    }


def _mark(text: str) -> str:
    return blake2b(text.encode(), digest_size=3).hexdigest()


def _make_weights(
    key: dg.AssetKey, entry: ModelEntry, recipes: list[Recipe], lineage: Lineage
) -> dg.AssetsDefinition:
    users = ", ".join(recipe.name for recipe in recipes)
    config = recipes[0].config

    @dg.asset(
        key=key,
        deps=lineage.upstream_of_weights(entry, recipes),
        group_name=GROUP,
        kinds={"modelscope" if entry.repository else "file", "safetensors"},
        description=f"{entry.text}\n\nUsed by: {users}",
        code_version=f"{__version__} {_mark(entry.text)}",
    )
    def weights(context: dg.AssetExecutionContext, hub: Hub) -> dg.MaterializeResult:
        from diffsynth_dagster.facts import FactCache, digest_of

        with (
            tried_again(context, _RETRIES, RETRY_DELAY_S * 2**context.retry_number),
            user_errors(),
            closing(FactCache(fact_cache_path(config))) as fact_cache,
        ):
            model_hub = hub.open()
            if entry.parameter in MODEL_FOLDERS:
                folder = model_hub.folder(entry)
                files = sorted(path for path in folder.rglob("*") if path.is_file())
                facts: dict[str, str | int] = {"component": entry.parameter.removesuffix("_path")}
            else:
                files = model_hub.files(entry)
                facts = _describe(entry, files)
                beside = files[0].parent / "config.json"
                files = [*files, *([beside] if beside.is_file() else [])]
            again = any(recipe.config.verify_content for recipe in recipes)
            digests = {path: fact_cache.digest(path, again) for path in files}
        sizes = {path: path.stat().st_size for path in files}
        rows = table(
            {"file": str(p), "bytes": sizes[p], "blake3": digest} for p, digest in digests.items()
        )
        return dg.MaterializeResult(
            metadata={**facts, "files": rows, "total_bytes": sum(sizes.values())},
            data_version=dg.DataVersion(digest_of(list(digests.values()))),
        )

    return weights


def _describe(entry: ModelEntry, files: list[Path]) -> dict[str, str | int]:
    """What the files are, and how many tensors and parameters of which types they hold.

    Raises:
        WeightsError: a file is damaged, or no component of a supported family.
    """
    from diffsynth_dagster.errors import WeightsError
    from diffsynth_dagster.families import each_family
    from diffsynth_dagster.weights.header import read_headers
    from diffsynth_dagster.weights.recognise import components_in

    header = read_headers(files)
    fits = {
        f"{component.name} of {family.name}": None
        for family in each_family()
        for component in (place.component for place in components_in(header, family))
    }
    if not fits:
        raise WeightsError(
            f"the file is of an unknown kind: its first tensors are {', '.join(sorted(header)[:3])}",
            where=f"{entry.parameter} = {entry.text}",
            do="check that it is a model of a supported family",
        )
    return {
        "component": ", ".join(fits),
        "tensors": len(header),
        "parameters": sum(prod(info.shape) for info in header.values()),
        "dtypes": ", ".join(sorted({info.dtype for info in header.values()})),
    }
