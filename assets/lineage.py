"""Edges between recipes: one trains from what lies in the run folder of another.

What a recipe reads is known from its parameters alone, before any file is there. Recipes that read from
each other in a circle have no edges: neither can be made anew before the other.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePath

import dagster as dg

from assets.common import Kind, asset_key, kinds_of
from diffsynth_dagster import promoted
from diffsynth_dagster.config import Recipe, TrainingConfig
from diffsynth_dagster.config.entries import ModelEntry, named_entries
from diffsynth_dagster.config.parameters import MARKS
from diffsynth_dagster.own_names import is_own

_READ = (
    *("dataset_metadata_path", "validation_metadata_path", "dataset_base_path"),
    *("preset_lora_path", "lora_checkpoint", "resume_from_checkpoint"),
)
"""Parameters that name a file or folder that is read. Those of models are assets of their own."""
_TABLES = ("metadata.parquet", "rejected.csv", "long_captions.parquet")
_KEPT = (("older",), (".older",))
"""Folders of a run folder that hold trainings of before: what lies there does not become another one."""
_VERSIONS, _CURRENT = PurePath(promoted.FOLDER).parts, PurePath(promoted.CURRENT).parts


class Lineage:
    """The edges between recipes.

    Args:
        recipes: all that are sound.
    """

    def __init__(self, recipes: Sequence[Recipe]) -> None:
        self._owners = {Path(os.path.realpath(r.config.output_path)): r for r in recipes}
        reads: dict[str, set[str]] = {r.name: set() for r in recipes}
        self._found: dict[str, list[tuple[str, str, Kind]]] = {}
        for recipe in recipes:
            found = self._found[recipe.name] = list(self._inputs(recipe.config))
            models = named_entries(recipe.config)
            places = [self._made_by(path) for entry in models for path in entry.paths]
            reads[recipe.name] |= {owner for _, owner, _ in found}
            reads[recipe.name] |= {place[0] for place in places if place is not None}
        self._edges = {
            (reader, owner)
            for reader, owners in reads.items()
            for owner in owners
            if not _reaches(owner, reader, reads)
        }

    def upstream(self, recipe: Recipe, kind: Kind) -> list[dg.AssetKey]:
        """The assets of other recipes that an asset of a recipe is made from."""
        kinds = kinds_of(recipe.config)
        keys = [
            asset_key(owner, made)
            for parameter, owner, made in self._found[recipe.name]
            if (recipe.name, owner) in self._edges and kind in _readers(parameter, kinds)
        ]
        return list(dict.fromkeys(keys))

    def upstream_of_weights(self, entry: ModelEntry, users: Sequence[Recipe]) -> list[dg.AssetKey]:
        """The assets of recipes that the files of a model are made by.

        Args:
            users: the recipes that name the model. One that made it itself leaves no edge.
        """
        keys: list[dg.AssetKey] = []
        for owner, made in filter(None, map(self._made_by, entry.paths)):
            if all((user.name, owner) in self._edges for user in users):
                keys.append(asset_key(owner, made))
        return list(dict.fromkeys(keys))

    def _inputs(self, config: TrainingConfig) -> Iterator[tuple[str, str, Kind]]:
        """Parameter, recipe and asset of all that a config reads from run folders of recipes."""
        named = {name: getattr(config, name) for name in _READ}
        for name, path in {**named, "sample_prompts": config.sample_table}.items():
            encoded = name == "dataset_base_path" and config.reads_encoded
            place = self._made_by(path, encoded) if path else None
            if place is not None:
                yield name, *place

    def _made_by(self, path: str, encoded: bool = False) -> tuple[str, Kind] | None:
        """The recipe and the asset that a file or folder is made by; None if there is none.

        Args:
            encoded: whether it is a folder of encoded samples.
        """
        file = Path(os.path.realpath(path))
        # The nearest one: a run folder may lie in another.
        folder = next((each for each in (file, *file.parents) if each in self._owners), None)
        if folder is None:
            return None
        place, owner = file.relative_to(folder), self._owners[folder]
        kind = "latents" if encoded else _kind(place)
        # A folder of weights or pictures may lie in a run folder, or be one.
        whole = place.parts[:1] in (("samples",), ("exports",))
        written = encoded or whole or is_own(place.as_posix())
        # A version that is named itself stays the same; behind `current` there is another one later.
        named = Path(os.path.abspath(path)).parts[-len(place.parts) :] == place.parts
        stays = place.parts[:1] in _KEPT or (place.parts[:2] == _VERSIONS and named)
        made = written and kind in kinds_of(owner.config) and not stays
        return (owner.name, kind) if made else None


def _kind(place: PurePath) -> Kind:
    """The asset that makes a file, by its path from the run folder."""
    if place.name in _TABLES:
        return "metadata"
    if place.parts[:2] in (_VERSIONS, _CURRENT):
        return "promoted"
    return "exports" if place.parts[:1] == ("exports",) else "checkpoints"


def _readers(parameter: str, kinds: Sequence[Kind]) -> list[Kind]:
    """The assets of a recipe that read what a parameter names.

    Args:
        kinds: those that the recipe has.
    """
    affects = MARKS[parameter].affects
    if affects == "rows" and "metadata" in kinds:
        return ["metadata"]
    # What is encoded with a file does not tell whether it has changed in what only training uses.
    found: list[Kind] = ["latents", "checkpoints"] if affects == "latents" else ["checkpoints"]
    return [kind for kind in found if kind in kinds]


def _reaches(start: str, end: str, reads: Mapping[str, set[str]]) -> bool:
    """Whether a recipe reads from another one, or from one that does, or is it."""
    seen, waiting = {start}, [start]
    while waiting:
        new = reads[waiting.pop()] - seen
        seen |= new
        waiting += new
    return end in seen
