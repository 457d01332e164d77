"""Edges between recipes: one recipe reads files that another one writes into its run folder.

Edges follow from the parameters alone, before any file exists. Recipes that read from each other in
a circle get no edges between them, since Dagster's graph must have no cycle.
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
"""Parameters that name a file or folder to read. (Models are missing: they are weights assets.)"""
_TABLES = ("metadata.parquet", "rejected.csv", "long_captions.parquet")
"""Files of a run folder that the metadata asset writes."""
_KEPT = (("older",), (".older",))
"""Folders of a run folder with earlier trainings, whose files never change: they give no edge."""
_VERSIONS, _CURRENT = PurePath(promoted.FOLDER).parts, PurePath(promoted.CURRENT).parts


class Lineage:
    """The edges between recipes.

    Args:
        recipes: all sound recipes.
    """

    def __init__(self, recipes: Sequence[Recipe]) -> None:
        # Real paths: a parameter may reach a run folder through a symbolic link.
        self._owners = {Path(os.path.realpath(r.config.output_path)): r for r in recipes}
        reads: dict[str, set[str]] = {r.name: set() for r in recipes}
        self._found: dict[str, list[tuple[str, str, Kind]]] = {}
        for recipe in recipes:
            found = self._found[recipe.name] = list(self._inputs(recipe.config))
            models = named_entries(recipe.config)
            places = [self._made_by(path) for entry in models for path in entry.paths]
            reads[recipe.name] |= {owner for _, owner, _ in found}
            reads[recipe.name] |= {place[0] for place in places if place is not None}
        # (reader, owner), without those that would close a circle.
        self._edges = {
            (reader, owner)
            for reader, owners in reads.items()
            for owner in owners
            if not _reaches(owner, reader, reads)
        }

    def upstream(self, recipe: Recipe, kind: Kind) -> list[dg.AssetKey]:
        """The assets of other recipes that this recipe's asset of a kind reads from."""
        kinds = kinds_of(recipe.config)
        keys = [
            asset_key(owner, made)
            for parameter, owner, made in self._found[recipe.name]
            if (recipe.name, owner) in self._edges and kind in _readers(parameter, kinds)
        ]
        return list(dict.fromkeys(keys))

    def upstream_of_weights(self, entry: ModelEntry, users: Sequence[Recipe]) -> list[dg.AssetKey]:
        """The recipe assets that make the files of a model, such as a promoted export.

        Args:
            users: the recipes that name the model. There is no edge if one of them makes it itself.
        """
        keys: list[dg.AssetKey] = []
        for owner, made in filter(None, map(self._made_by, entry.paths)):
            if all((user.name, owner) in self._edges for user in users):
                keys.append(asset_key(owner, made))
        return list(dict.fromkeys(keys))

    def _inputs(self, config: TrainingConfig) -> Iterator[tuple[str, str, Kind]]:
        """(parameter, recipe, asset) for each file that a config reads from a run folder."""
        named = {name: getattr(config, name) for name in _READ}
        for name, path in {**named, "sample_table": config.sample_table}.items():
            encoded = name == "dataset_base_path" and config.reads_encoded
            place = self._made_by(path, encoded) if path else None
            if place is not None:
                yield name, *place

    def _made_by(self, path: str, encoded: bool = False) -> tuple[str, Kind] | None:
        """The (recipe, asset) that makes a file or folder; None if no recipe does.

        Args:
            encoded: whether it is a folder of encoded samples.
        """
        file = Path(os.path.realpath(path))
        # The innermost run folder: one may lie in another.
        folder = next((parent for parent in (file, *file.parents) if parent in self._owners), None)
        if folder is None:
            return None
        place, owner = file.relative_to(folder), self._owners[folder]
        kind = "latents" if encoded else _kind(place)
        # A user may keep files of their own in a run folder. Only what the trainer writes counts.
        whole = place.parts[:1] in (("samples",), ("exports",))
        written = encoded or whole or is_own(place.as_posix())
        # A promoted version never changes, so a path to it gives no edge. A path through the link
        # `current` does: later it leads to another version.
        named = Path(os.path.abspath(path)).parts[-len(place.parts) :] == place.parts
        stays = place.parts[:1] in _KEPT or (place.parts[:2] == _VERSIONS and named)
        made = written and kind in kinds_of(owner.config) and not stays
        return (owner.name, kind) if made else None


def _kind(place: PurePath) -> Kind:
    """The asset that makes a file, by the file's path inside the run folder."""
    if place.name in _TABLES:
        return "metadata"
    if place.parts[:2] in (_VERSIONS, _CURRENT):
        return "promoted"
    return "exports" if place.parts[:1] == ("exports",) else "checkpoints"


def _readers(parameter: str, kinds: Sequence[Kind]) -> list[Kind]:
    """The assets of a recipe that read the file that a parameter names.

    Args:
        kinds: the assets that the recipe has.
    """
    affects = MARKS[parameter].affects
    if affects == "rows" and "metadata" in kinds:
        return ["metadata"]
    # Checkpoints too, not only through the latents: the file may change in parts that only the
    # training uses, and the latents then stay the same.
    found: list[Kind] = ["latents", "checkpoints"] if affects == "latents" else ["checkpoints"]
    return [kind for kind in found if kind in kinds]


def _reaches(start: str, end: str, reads: Mapping[str, set[str]]) -> bool:
    """Whether recipe `start` reads from recipe `end`, directly or through others, or is it."""
    seen, waiting = {start}, [start]
    while waiting:
        new = reads[waiting.pop()] - seen
        seen |= new
        waiting += new
    return end in seen
