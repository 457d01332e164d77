"""What stands before everything that is made of a folder of recipes, in the code location of others."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import dagster as dg

from diffsynth_dagster.errors import ParameterError


@dataclass(frozen=True)
class Prefix:
    """A prefix of keys and names. Without parts it changes nothing.

    Attributes:
        parts: the first parts of each key.
    """

    parts: tuple[str, ...] = ()

    @classmethod
    def of(cls, given: str | Sequence[str] | None) -> "Prefix":
        """A prefix as it is given to Dagster: one part, several, or none.

        Raises:
            ParameterError: a part has other characters than letters, digits and '_'.
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
        """The key of an asset: `vision/demo/exports`."""
        return key.with_prefix(self.parts) if self.parts else key

    def name(self, name: str) -> str:
        """The name of a job, schedule, sensor or group: `vision_train_demo`."""
        return "_".join([*self.parts, name])

    def step(self, key: dg.AssetKey) -> str:
        """The name of the step that makes an asset, by the key that it has without the prefix."""
        return self._step(key.to_python_identifier())

    def assets(self, assets: Sequence[dg.AssetsDefinition]) -> list[dg.AssetsDefinition]:
        """All assets of a folder of recipes, with the edges between them and their checks."""
        if not self.parts:
            return list(assets)
        keys = {key: self.key(key) for each in assets for key in each.keys}
        return [self._asset(each.with_attributes(asset_key_replacements=keys)) for each in assets]

    def selection(self, keys: Iterable[dg.AssetKey]) -> dg.AssetSelection:
        """Assets by the keys that they have without the prefix."""
        return dg.AssetSelection.assets(*map(self.key, keys))

    def _step(self, name: str) -> str:
        return "__".join([*self.parts, name])

    def _asset(self, asset: dg.AssetsDefinition) -> dg.AssetsDefinition:
        """An asset with its group and its step renamed: names of steps must differ in a code location,
        and Dagster makes them of the keys that assets had first."""
        asset = asset.map_asset_specs(
            lambda spec: spec.replace_attributes(group_name=self.name(spec.group_name or "default"))
        )
        attributes = asset.get_attributes_dict()
        op: Any = attributes["node_def"]
        if op is None:
            return asset
        renamed = op.with_replaced_properties(name=self._step(op.name))
        return type(asset).dagster_internal_init(**{**attributes, "node_def": renamed})
