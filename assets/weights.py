"""`weights/<model>`: the files of one entry of a model list."""

from collections.abc import Sequence
from contextlib import closing
from hashlib import blake2b
from math import prod
from pathlib import Path

import dagster as dg

from assets.common import asset_key, book_path, table, user_errors
from diffsynth_dagster import __version__
from diffsynth_dagster.config import Recipe, TrainingConfig
from diffsynth_dagster.config.entries import ModelEntry, folder_entry, model_entries
from diffsynth_dagster.config.parameters import TOKENIZERS
from resources import Hub

GROUP = "weights"
_RETRIES = dg.RetryPolicy(max_retries=3, delay=5, backoff=dg.Backoff.EXPONENTIAL)


class WeightsAssets:
    """One asset for each distinct entry of the recipes' model lists."""

    def __init__(self, recipes: Sequence[Recipe]) -> None:
        uses: dict[str, list[tuple[Recipe, ModelEntry]]] = {}
        for recipe in recipes:
            for entry in _entries(recipe.config):
                uses.setdefault(entry.text, []).append((recipe, entry))
        slugs: dict[str, list[str]] = {}
        for text, users in uses.items():
            slugs.setdefault(users[0][1].slug, []).append(text)
        self._names = {
            # Different entries may be written alike but for signs that a name cannot have.
            text: slug if len(texts) == 1 else f"{slug}_{_mark(text)}"
            for slug, texts in slugs.items()
            for text in texts
        }
        self.definitions = [
            _make_weights(self._names[text], users[0][1], [recipe for recipe, _ in users])
            for text, users in uses.items()
        ]

    def keys(self, recipe: Recipe) -> list[dg.AssetKey]:
        """The weights that a recipe uses."""
        return [asset_key("weights", self._names[e.text]) for e in _entries(recipe.config)]


def _entries(config: TrainingConfig) -> list[ModelEntry]:
    entries = list(model_entries(config))
    for parameter in TOKENIZERS:
        given = getattr(config, parameter)
        if given is not None:
            entries.append(folder_entry(given, parameter))
    return entries


def _mark(text: str) -> str:
    return blake2b(text.encode(), digest_size=3).hexdigest()


def _make_weights(name: str, entry: ModelEntry, recipes: list[Recipe]) -> dg.AssetsDefinition:
    users = ", ".join(recipe.name for recipe in recipes)
    config = recipes[0].config

    @dg.asset(
        key=asset_key("weights", name),
        group_name=GROUP,
        kinds={"modelscope" if entry.repository else "file", "safetensors"},
        description=f"{entry.text}\n\nUsed by: {users}",
        code_version=f"{__version__} {_mark(entry.text)}",
        retry_policy=_RETRIES,
    )
    def weights(hub: Hub) -> dg.MaterializeResult:
        from diffsynth_dagster.facts import FactBook, digest_of

        with user_errors(), closing(FactBook(book_path(config))) as book:
            model_hub = hub.open()
            if entry.parameter in TOKENIZERS:
                folder = model_hub.folder(entry)
                files = sorted(path for path in folder.rglob("*") if path.is_file())
                facts: dict[str, str | int] = {"component": entry.parameter.removesuffix("_path")}
            else:
                files = model_hub.files(entry)
                facts = _describe(entry, files)
                beside = files[0].parent / "config.json"
                files = [*files, *([beside] if beside.is_file() else [])]
            digests = {path: book.digest(path) for path in files}
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
    from diffsynth_dagster.weights.recognise import recognise

    header = read_headers(files)
    fits = {
        f"{component.name} of {family.name}": None
        for family in each_family()
        for component in family.components
        if recognise(header, component)
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
