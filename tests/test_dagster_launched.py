"""An overridden run does not look like its recipe's."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
from dagster_support import definitions_of, told, write_recipe

from assets.common import KINDS, asset_key, code_version
from assets.launched import Launched
from diffsynth_dagster.config import read_config

MISSING = "the metadata file does not exist"


def recipe(name: str, **overrides: Any) -> dict[str, Any]:
    """Parameters of a training whose first step fails: its table does not exist."""
    return {
        "family": "qwen_image",
        "dataset_base_path": "none",
        "dataset_metadata_path": "none/metadata.csv",
        "model_paths": '["none/dit.safetensors"]',
        "lora_base_model": "dit",
        "output_path": f"none/{name}",
        **overrides,
    }


@pytest.fixture
def instance() -> Iterator[dg.DagsterInstance]:
    with dg.instance_for_test() as made:
        yield made


def test_overrides_are_for_one_recipe(tmp_path: Path, instance: dg.DagsterInstance) -> None:
    write_recipe(tmp_path, "a", recipe("a"))
    write_recipe(tmp_path, "b", recipe("b"))
    job = definitions_of(tmp_path).resolve_implicit_global_asset_job_def()
    config = {"resources": {"parameters": {"config": {"num_epochs": 9}}}}
    a, b = (asset_key(name, "metadata") for name in "ab")

    def reasons(run_config: dict[str, Any], *assets: dg.AssetKey) -> set[str]:
        done = job.execute_in_process(
            run_config, instance, raise_on_error=False, asset_selection=assets
        )
        return set(told(done.all_events).reasons)

    for said in reasons(config, a, b):
        assert "are for one recipe, and the run has assets of 'a' and 'b'" in said
        assert "where: resources.parameters.config: num_epochs" in said
        assert "what to do: launch a run for each recipe" in said
    for run_config, assets in (({}, [a, b]), (config, [b])):
        assert all(MISSING in said for said in reasons(run_config, *assets))


@pytest.mark.parametrize(
    ("changed", "kinds"),
    [
        ({}, ""),
        ({"wandb_project": "x"}, ""),
        ({"cache_path": "elsewhere"}, ""),
        ({"output_path": "none/../none/a"}, ""),
        ({"num_epochs": 9}, "checkpoints"),
        ({"lora_checkpoint": "b.safetensors"}, "checkpoints exports"),
        ({"sample_cfg_scale": 2.0}, "latents checkpoints"),
        ({"model_paths": '["b.safetensors"]'}, "metadata latents checkpoints exports"),
        ({"dataset_metadata_path": "b.csv"}, "metadata latents checkpoints exports"),
        ({"export_formats": ["kohya"]}, "exports"),
        ({"output_path": "none/b"}, "metadata latents checkpoints exports"),
    ],
)
def test_overridden_assets_have_another_code_version(changed: dict[str, Any], kinds: str) -> None:
    """Also where the assets upstream, of the recipe's own files and folder, are not what was used."""
    own, ran = (read_config(recipe("a", **values), "the test") for values in ({}, changed))
    dumped = ran.model_dump(mode="json")
    launched = Launched(ran, {name: dumped[name] for name in changed}, own.output_path)
    versions = {kind: launched.tags(kind)["dagster/code_version"] for kind in KINDS}
    other = {kind for kind in KINDS if versions[kind] != code_version(own, kind)}
    assert other == set(kinds.split())
