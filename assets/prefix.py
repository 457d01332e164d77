"""The prefix of all keys and names of a folder of recipes, for a team's own Dagster project."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import dagster as dg

from diffsynth_dagster.errors import ParameterError


@dataclass(frozen=True)
class Prefix:
    """A prefix of keys and names. An empty one changes nothing.

    Attributes:
        parts: the first parts of each key.
    """

    parts: tuple[str, ...] = ()

    @classmethod
    def of(cls, given: str | Sequence[str] | None) -> "Prefix":
        """A prefix from what the user gives: one part, several, or none.

        Raises:
            ParameterError: a part has characters other than letters, digits and '_'.
        """
        parts = (given,) if isinstance(given, str) else tuple(given or ())
        for part in parts:
            if not re.fullmatch(r"[A-Za-z0-9_]+", part):
                raise ParameterError(
                    f"'{part}' cannot stand before the keys of assets and the names of jobs",
                    where="key_prefix",
                    do="take letters, digits and '_'; write several parts as a list",
                )
        return cls(parts)

    def key(self, key: dg.AssetKey) -> dg.AssetKey:
        """An asset key with the prefix: `vision/demo/exports`."""
        return key.with_prefix(self.parts) if self.parts else key

    def name(self, name: str) -> str:
        """The name of a job, schedule, sensor or group with the prefix: `vision_train_demo`."""
        return "_".join([*self.parts, name])

    def step(self, key: dg.AssetKey) -> str:
        """The name of the step that makes an asset: `vision__demo__exports`.

        Args:
            key: the asset's key without the prefix.
        """
        return self._step(key.to_python_identifier())

    def assets(self, assets: Sequence[dg.AssetsDefinition]) -> list[dg.AssetsDefinition]:
        """The assets with the prefix in their keys, groups, steps, dependencies and checks."""
        if not self.parts:
            return list(assets)
        keys = {key: self.key(key) for asset in assets for key in asset.keys}
        # Not `map_asset_specs`, which refuses to change keys. This changes them in dependencies and
        # checks as well.
        return [self._renamed(a.with_attributes(asset_key_replacements=keys)) for a in assets]

    def selection(self, keys: Iterable[dg.AssetKey]) -> dg.AssetSelection:
        """A selection of assets, by their keys without the prefix."""
        return dg.AssetSelection.assets(*map(self.key, keys))

    def _step(self, name: str) -> str:
        return "__".join([*self.parts, name])

    def _renamed(self, asset: dg.AssetsDefinition) -> dg.AssetsDefinition:
        """An asset with its group and its step renamed."""
        asset = asset.map_asset_specs(
            lambda spec: spec.replace_attributes(group_name=self.name(spec.group_name or "default"))
        )
        attributes = asset.get_attributes_dict()
        op: Any = attributes["node_def"]
        if op is None:
            return asset
        # Dagster named the step after the first key of the asset. Step names must be unique in a
        # code location, so two folders of recipes with different prefixes would clash.
        renamed = op.with_replaced_properties(name=self._step(op.name))
        return type(asset).dagster_internal_init(**{**attributes, "node_def": renamed})
