"""A run is what it was launched with, and an overridden one does not look like its recipe's."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
from dagster._core.definitions.reconstruct import ReconstructableRepository
from dagster._core.execution.api import execute_run
from dagster_support import definitions_of, told, write_recipe

from assets.common import KINDS, asset_key, code_version
from assets.launched import Launched
from diffsynth_dagster.config import read_config
from resources import PARAMETERS

CHANGED = "the recipe changed since the run was launched"
MISSING = "the metadata file does not exist"
LOCATION = """
from pathlib import Path
from dagster_support import definitions_of
definitions = definitions_of(Path({folder!r}))
"""


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


def without_edit(path: Path) -> None:
    """Leaves the recipe as it is."""


def edit(path: Path) -> None:
    path.write_text(path.read_text() + "num_epochs: 9\n")


def describe(path: Path) -> None:
    path.write_text(path.read_text() + "# no parameter\ndescription: Teaches a.\n")


def break_it(path: Path) -> None:
    path.write_text(path.read_text() + "num_epoch: 9\n")


def mend(path: Path) -> None:
    write_recipe(path.parent, path.stem, recipe("a"))


@pytest.mark.parametrize("name", ["train_a", "__ASSET_JOB"])
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (without_edit, MISSING),
        (describe, MISSING),
        (edit, CHANGED),
        (break_it, "unknown parameter 'num_epoch'"),
        (mend, CHANGED),
    ],
)
def test_recipe_is_that_of_the_launch(
    tmp_path: Path,
    instance: dg.DagsterInstance,
    name: str,
    change: Callable[[Path], None],
    words: str,
) -> None:
    """A run is launched from the definitions of one process, and starts in another one: as a server of
    Dagster does it, with what the Launchpad of a job shows, and with assets that are picked in the graph."""
    path = write_recipe(tmp_path / "recipes", "a", recipe("a"))
    if change is mend:
        break_it(path)
    picked = frozenset({asset_key("a", "metadata")})
    known = definitions_of(path.parent).get_repository_def().get_job(name)
    known = known.get_subset(asset_selection=picked)
    shown = {"num_epochs": 1, "retrain": False} if name == "train_a" else {}
    run = instance.create_run_for_job(known, run_config=shown, asset_selection=picked)
    change(path)
    location = tmp_path / "location.py"
    location.write_text(LOCATION.format(folder=str(path.parent)))
    repository = ReconstructableRepository.for_file(str(location), "definitions")
    job = repository.get_reconstructable_job(name).get_subset(asset_selection=picked)
    execute_run(job, run, instance)
    logs = instance.all_logs(run.run_id)
    said = told(entry.dagster_event for entry in logs if entry.dagster_event is not None)
    assert words in said.reason
    if words == CHANGED:
        assert f"where: {path}" in said.reason
        assert "what to do: reload definitions" in said.reason
    assert not said.trace


def test_overrides_are_for_one_recipe(tmp_path: Path, instance: dg.DagsterInstance) -> None:
    write_recipe(tmp_path, "a", recipe("a"))
    write_recipe(tmp_path, "b", recipe("b"))
    job = definitions_of(tmp_path).resolve_implicit_global_asset_job_def()
    config = {"resources": {PARAMETERS: {"config": {"num_epochs": 9}}}}
    a, b = (asset_key(name, "metadata") for name in "ab")

    def reasons(run_config: dict[str, Any], *assets: dg.AssetKey) -> set[str]:
        done = job.execute_in_process(
            run_config, instance, raise_on_error=False, asset_selection=assets
        )
        return set(told(done.all_events).reasons)

    for said in reasons(config, a, b):
        assert "are for one recipe, and the run has assets of 'a' and 'b'" in said
        assert "where: resources.diffsynth_parameters.config: num_epochs" in said
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
        ({"lora_checkpoint": "b.safetensors"}, "checkpoints exports promoted"),
        ({"sample_cfg_scale": 2.0}, "latents checkpoints"),
        ({"model_paths": '["b.safetensors"]'}, "metadata latents checkpoints exports promoted"),
        ({"dataset_metadata_path": "b.csv"}, "metadata latents checkpoints exports promoted"),
        ({"export_formats": ["kohya"]}, "exports"),
        ({"output_path": "none/b"}, "metadata latents checkpoints exports promoted"),
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
