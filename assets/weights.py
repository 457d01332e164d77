"""`weights/<owner>/<repository>/<component>`: the files of one entry of a model list. The key of
local files is made of their path."""

from collections.abc import Sequence
from math import prod
from pathlib import Path

import dagster as dg

from assets.common import RETRY_DELAY_S, table, tried_again, user_errors
from assets.launched import OWN
from assets.lineage import Lineage
from assets.unchanged import look_at_weights
from diffsynth_dagster.config import Recipe
from diffsynth_dagster.config.entries import (
    MODEL_FOLDERS,
    ModelEntry,
    mark_of_text,
    named_entries,
)
from diffsynth_dagster.versions import VERSIONS
from resources import Hub

GROUP = "weights"
_RETRIES = 3


class WeightsAssets:
    """The weights assets: one for each distinct entry of the recipes' model lists."""

    def __init__(self, recipes: Sequence[Recipe], lineage: Lineage) -> None:
        uses: dict[dg.AssetKey, list[tuple[Recipe, ModelEntry]]] = {}
        for recipe in recipes:
            for entry in named_entries(recipe.config):
                uses.setdefault(weights_key(entry), []).append((recipe, entry))
        self.definitions = [
            _make_weights(key, users[0][1], [recipe for recipe, _ in users], lineage)
            for key, users in uses.items()
        ]


def weights_key(entry: ModelEntry) -> dg.AssetKey:
    """Key of the asset of an entry of a model list: `weights/Qwen/Qwen-Image/transformer`."""
    return dg.AssetKey([GROUP, *entry.name])


def weights_keys(recipe: Recipe) -> list[dg.AssetKey]:
    """Keys of the weights assets that a recipe uses."""
    return [weights_key(entry) for entry in named_entries(recipe.config)]


def _make_weights(
    key: dg.AssetKey, entry: ModelEntry, recipes: list[Recipe], lineage: Lineage
) -> dg.AssetsDefinition:
    users = ", ".join(recipe.name for recipe in recipes)
    # Only its `cache_path` is used: any recipe that names the weights will do.
    config = recipes[0].config
    again = any(recipe.config.verify_content for recipe in recipes)
    # Different entries may lead to the same key. The asset is stale when its recipe names another.
    code = f"{VERSIONS['weights']} {mark_of_text(entry.same)}"

    @dg.asset(
        key=key,
        deps=lineage.upstream_of_weights(entry, recipes),
        group_name=GROUP,
        kinds={"modelscope" if entry.repository else "file", "safetensors"},
        op_tags=OWN,
        description=f"{entry.text}\n\nUsed by: {users}",
        code_version=code,
    )
    def weights(context: dg.AssetExecutionContext, diffsynth_hub: Hub) -> dg.MaterializeResult:
        from diffsynth_dagster.facts import digest_of, fact_cache_of

        seen = look_at_weights(context, entry, code)
        same = None if again else seen.unchanged()
        if same is not None:
            return same
        with (
            # A download may fail for minutes: wait 5, 10 and 20 seconds.
            tried_again(context, _RETRIES, RETRY_DELAY_S * 2**context.retry_number),
            user_errors(),
            fact_cache_of(config.cache_path) as fact_cache,
        ):
            model_hub = diffsynth_hub.open()
            if entry.parameter in MODEL_FOLDERS:
                folder = model_hub.folder(entry)
                files = sorted(path for path in folder.rglob("*") if path.is_file())
                facts: dict[str, str | int] = {"component": entry.parameter.removesuffix("_path")}
            else:
                files = model_hub.files(entry)
                facts = _describe(entry, files)
                # A config.json beside the weights holds their architecture, so it counts as well.
                beside = files[0].parent / "config.json"
                files = [*files, *([beside] if beside.is_file() else [])]
            digests = {path: fact_cache.digest(path, again) for path in files}
        sizes = {path: path.stat().st_size for path in files}
        rows = table(
            {"file": str(p), "bytes": sizes[p], "blake3": digest} for p, digest in digests.items()
        )
        return dg.MaterializeResult(
            metadata={**facts, "files": rows, "total_bytes": sum(sizes.values())},
            data_version=dg.DataVersion(digest_of(list(digests.values()))),
            tags=seen.marked,
        )

    return weights


def _describe(entry: ModelEntry, files: list[Path]) -> dict[str, str | int]:
    """Metadata of weight files: the components that they may be, their tensors and their types.

    Raises:
        WeightsError: a file is damaged, or not a component of a supported family.
    """
    from diffsynth_dagster.errors import WeightsError
    from diffsynth_dagster.families import each_family
    from diffsynth_dagster.weights.header import read_headers
    from diffsynth_dagster.weights.recognise import components_in

    header = read_headers(files)
    # Families share components, so a file may fit several.
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
