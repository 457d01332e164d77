"""Recipes in a Dagster project of others: as a component, and merged into their definitions."""

import ast
import importlib
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
import yaml
from conftest import ROOT
from dagster._core.definitions.reconstruct import ReconstructableRepository
from dagster_support import home, write_recipe
from process_support import forked_launches
from team_project import WRITTEN, team_project, write_files

from assets.common import KINDS
from diffsynth_dagster.check import main as check
from diffsynth_dagster.component import Recipes, make_definitions
from diffsynth_dagster.errors import ParameterError

ENTRY_POINT = 'diffsynth_dagster = "diffsynth_dagster.component"'


@dataclass
class Team:
    """The project of a team, loaded as Dagster loads it."""

    repository: ReconstructableRepository
    definitions: dg.RepositoryDefinition
    instance: dg.DagsterInstance
    used: list[str]

    def run(self, job: str, *assets: dg.AssetKey) -> list[dg.DagsterEvent]:
        """Run a job with the executor and the loggers that it has; returns what came of it."""
        found = self.repository.get_reconstructable_job(job)
        with dg.execute_job(found, self.instance, asset_selection=list(assets) or None) as result:
            assert result.success
            return list(result.all_events)


@pytest.fixture(scope="module")
def team(tmp_path_factory: pytest.TempPathFactory, shared_values: dict[str, Any]) -> Iterator[Team]:
    folder = tmp_path_factory.mktemp("team")
    recipe = {**shared_values, "output_path": str(folder / "run")}
    recipe["retrain"] = {"cron": "0 3 * * *", "when": "always"}
    with (
        team_project(folder / "project", recipe) as project,
        dg.DagsterInstance.from_config(str(home(folder / "home"))) as instance,
        forked_launches(),
    ):
        repository = ReconstructableRepository.for_module("team.definitions", "defs", str(project))
        used = importlib.import_module("team.assets").USED
        yield Team(repository, repository.get_definition(), instance, used)


def asset_keys(events: Sequence[dg.DagsterEvent]) -> set[str]:
    """The keys of everything that was said of assets."""
    found = {e.asset_key for e in events if e.asset_key is not None}
    kind = dg.DagsterEventType.ASSET_CHECK_EVALUATION
    found |= {e.asset_check_evaluation_data.asset_key for e in events if e.event_type == kind}
    return {key.to_user_string() for key in found}


def test_an_export_is_made_in_a_teams_project(
    team: Team, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """By our executor and logger, and with nothing of theirs."""
    del team.used[:]
    events = team.run("vision_train_tiny")
    assert team.used == []
    assert "vision/tiny/exports: done" in capfd.readouterr().err
    made = asset_keys(events)
    assert {k for k in made if "weights" not in k} == {f"vision/tiny/{k}" for k in ("data", *KINDS)}
    assert all(key.startswith("vision/") for key in made)
    (folder,) = (
        e.step_materialization_data.materialization.metadata["folder"].value
        for e in events
        if e.is_step_materialization
        and e.step_materialization_data.materialization.asset_key.path[-1] == "exports"
    )
    assert list(Path(str(folder)).rglob("*.safetensors"))


@pytest.mark.parametrize("job", ["sell", "__ASSET_JOB"])
def test_assets_of_a_team_stay_as_they_are(team: Team, job: str) -> None:
    """In a job of theirs, and picked in the graph."""
    del team.used[:]
    assert asset_keys(team.run(job, dg.AssetKey("sales"))) == {"sales"}
    expected = {"their executor", "3 sold through their hub"}
    assert set(team.used) == expected | ({"their logger"} if job == "sell" else set())
    spec = team.definitions.asset_graph.get(dg.AssetKey("sales"))
    assert not spec.owners
    assert spec.group_name == "default"


def test_a_team_sets_owners_tags_and_automation(team: Team) -> None:
    graph = team.definitions.asset_graph
    ours = [key for key in graph.get_all_asset_keys() if key.path[0] == "vision"]
    assert len(ours) == 4 + len(KINDS) + 1
    for key in ours:
        assert graph.get(key).owners == ["team:vision"]
        assert graph.get(key).tags["tier"] == "gold"
    automated = {key.path[-1] for key in ours if graph.get(key).automation_condition is not None}
    assert automated == {"exports"}
    assert graph.get(dg.AssetKey(["vision", "tiny", "latents"])).parent_keys > {
        dg.AssetKey(["vision", "tiny", "metadata"])
    }
    assert team.definitions.has_schedule_def("vision_retrain_tiny")


def recipe(**overrides: Any) -> dict[str, Any]:
    """Parameters of a training whose files need not exist."""
    return {
        "family": "qwen_image",
        "dataset_base_path": "none",
        "dataset_metadata_path": "none/metadata.csv",
        "model_paths": ["none/dit.safetensors"],
        "lora_base_model": "dit",
        "output_path": "none/run",
        **overrides,
    }


def test_folders_with_the_same_recipes_live_side_by_side(tmp_path: Path) -> None:
    """Under prefixes of their own: keys, steps, groups, jobs and schedules, also of a broken recipe."""
    write_recipe(tmp_path, "a", recipe(retrain={"cron": "0 3 * * *", "when": "always"}))
    nightly = recipe(retrain={"cron": "0 3 * * *"}, output_path="none/nightly")
    write_recipe(tmp_path, "nightly", nightly)
    write_recipe(tmp_path, "broken", recipe(num_epoch=1))
    prefixes = (None, "one", ["two", "three"])
    merged = dg.Definitions.merge(*(make_definitions(tmp_path, prefix) for prefix in prefixes))
    dg.Definitions.validate_loadable(merged)
    sound = ("data", *KINDS)
    names = {"a": sound, "nightly": sound, "broken": KINDS, "weights": ("none/dit",)}
    expected = {f"{name}/{kind}" for name, kinds in names.items() for kind in kinds}
    graph = merged.resolve_asset_graph()
    found = {key.to_user_string(): key for key in graph.get_all_asset_keys()}
    assert set(found) == {p + key for p in ("", "one/", "two/three/") for key in expected}
    assert {graph.get(key).group_name for key in found.values()} == {
        p + name for p in ("", "one_", "two_three_") for name in names
    }
    parents = graph.get(found["two/three/a/latents"]).parent_keys
    assert {p.to_user_string() for p in parents} == {
        "two/three/a/metadata",
        "two/three/weights/none/dit",
    }
    for prefix, before in (("", ""), ("one_", "one/"), ("two_three_", "two/three/")):
        job = merged.resolve_job_def(f"{prefix}train_a")
        own = {before + key for key in expected if key.startswith(("a/", "weights/"))}
        assert {k.to_user_string() for k in job.asset_layer.executable_asset_keys} == own
        assert {node.name for node in job.nodes} == {
            key.replace("/", "__").replace("-", "_") for key in own
        }
        assert merged.resolve_schedule_def(f"{prefix}retrain_a").job_name == job.name
        assert dg.validate_run_config(job, {"num_epochs": 3, "retrain": True, "log_level": "ERROR"})
        assert merged.resolve_sensor_def(f"{prefix}changed_nightly") is not None
        condition = repr(graph.get(found[f"{before}nightly/exports"]).automation_condition)
        for key in re.findall(r"AssetKey\((\[[^]]*\])\)", condition):
            assert "/".join(ast.literal_eval(key)) in found
            assert ast.literal_eval(key)[:-2] == before.split("/")[:-1]


def test_mistakes_of_a_component_are_named(tmp_path: Path) -> None:
    with pytest.raises(ParameterError, match="'a b' cannot stand before the keys"):
        make_definitions(tmp_path, ["x", "a b"])
    with pytest.raises(ParameterError, match="folder of recipes does not exist") as error:
        dg.components.build_defs_for_component(Recipes(folder=str(tmp_path / "none")))
    assert str(tmp_path / "none") in str(error.value)


def test_recipes_are_checked_for_ci(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What the code location refuses, and what `--dry_run --no_files` does; without a file of the models."""
    write_recipe(tmp_path, "sound", recipe())
    assert check([str(tmp_path)]) == 0
    assert "1 of 1 recipes" in capsys.readouterr().out
    write_recipe(tmp_path, "unknown", recipe(num_epoch=1))
    planless = recipe(num_frames=5, output_path="none/planless")
    write_recipe(tmp_path, "planless", planless)
    assert check([str(tmp_path)]) == 1
    said = capsys.readouterr().out.splitlines()
    assert [line for line in said if line.startswith(("sound", "planless", "unknown"))] == [
        "planless.yaml: num_frames = 5 is given, but qwen_image is trained on images",
        "unknown.yaml: unknown parameter 'num_epoch'; did you mean 'num_epochs'?",
    ]
    assert said[-1].startswith("1 of 3 recipes")
    assert check([str(tmp_path / "none")]) == 2
    assert "the folder of recipes does not exist" in capsys.readouterr().err


@pytest.mark.soak
def test_dg_knows_the_component_and_this_project(tmp_path: Path) -> None:
    """The real commands, in a project that `create-dagster` has just made, and in this one."""
    commands = Path(sys.executable).parent

    def run(folder: Path, *words: str) -> str:
        paths = [
            os.environ.get("PYTHONPATH", ""),
            str(project / "src"),
        ]  # in place of an installation
        env = {**os.environ, "DAGSTER_HOME": str(dagster_home), "COLUMNS": "200"}
        env["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
        command = [str(commands / words[0]), *words[1:]]
        done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    dagster_home, project = home(tmp_path / "home"), tmp_path / "team"
    run(tmp_path, "create-dagster", "project", "--no-uv-sync", "team")
    for name, text in WRITTEN.items():
        if name.endswith(".py"):
            assert (project / name).read_text().strip() == text.strip()
    assert "diffsynth_dagster.component.Recipes" in run(project, "dg", "list", "components")
    run(project, "dg", "scaffold", "defs", "diffsynth_dagster.component.Recipes", "vision")
    vision = project / "src" / "team" / "defs" / "vision"
    written = yaml.safe_load((vision / "defs.yaml").read_text())
    assert written["type"] == "diffsynth_dagster.component.Recipes"
    write_files(
        vision, {"defs.yaml": yaml.safe_dump({**written, "attributes": {"key_prefix": "v"}})}
    )
    write_recipe(vision / "recipes", "a", recipe())
    assert "v/a/exports" in run(project, "dg", "list", "defs")
    run(project, "dg", "check", "defs")
    assert "demo/exports" in run(ROOT, "dg", "list", "defs")
    run(ROOT, "dg", "check", "defs")
    run(ROOT, "dg", "launch", "--assets", 'key:"demo/metadata"')


def test_the_component_is_announced_to_dg() -> None:
    """The entry point names the module that has it. (What an installation announces: see the soak test.)"""
    from dagster.components.core.package_entry import discover_package_objects

    assert ENTRY_POINT in (ROOT / "pyproject.toml").read_text()
    found = discover_package_objects(["diffsynth_dagster.component"])
    assert [key.name for key in found] == ["Recipes"]
