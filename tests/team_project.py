"""A team's Dagster project as `create-dagster project team` writes it, with things of their own and our
component in it."""

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dagster_support import write_recipe

WRITTEN = {
    "pyproject.toml": """
[project]
name = "team"
version = "0.1.0"
dependencies = ["dagster"]

[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[tool.dg]
directory_type = "project"

[tool.dg.project]
root_module = "team"
registry_modules = ["team.components.*"]
""",
    "src/team/__init__.py": "",
    "src/team/defs/__init__.py": "",
    "src/team/definitions.py": """
from pathlib import Path

from dagster import definitions, load_from_defs_folder


@definitions
def defs():
    return load_from_defs_folder(path_within_project=Path(__file__).parent)
""",
}
"""What `create-dagster` leaves (soak: what it leaves is compared with this)."""
THEIRS = {
    "src/team/assets/__init__.py": """
import dagster as dg

USED = []


@dg.asset
def sales(hub: dg.ResourceParam[str], parameters: dg.ResourceParam[int]) -> str:
    return f"{parameters} sold through {hub}"
""",
    "src/team/defs/theirs.py": """
import logging

import dagster as dg

from team.assets import USED, sales


class Shelf(dg.IOManager):
    def handle_output(self, context, obj):
        USED.append(obj)

    def load_input(self, context):
        raise NotImplementedError


@dg.executor(name="theirs", config_schema=dg.in_process_executor.config_schema)
def executor(context):
    USED.append("their executor")
    return dg.in_process_executor.executor_creation_fn(context)


@dg.logger
def console(context):
    USED.append("their logger")
    return logging.getLogger("team")


@dg.definitions
def defs():
    return dg.Definitions(
        assets=[sales],
        jobs=[dg.define_asset_job("sell", [sales], config={"loggers": {"console": {}}})],
        resources={"hub": "their hub", "parameters": 3, "launcher": 1, "io_manager": Shelf()},
        loggers={"console": console},
        executor=executor,
    )
""",
    "src/team/defs/vision/defs.yaml": """
type: diffsynth_dagster.component.Recipes
attributes:
  key_prefix: vision
post_processing:
  assets:
    - target: "*"
      attributes:
        owners: ["team:vision"]
        tags: {tier: gold}
    - target: 'key:"vision/tiny/exports"'
      attributes:
        automation_condition: "{{ automation_condition.on_cron('0 3 * * *') }}"
""",
}


def write_files(folder: Path, files: Mapping[str, str]) -> None:
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text.lstrip())


@contextmanager
def team_project(folder: Path, recipe: Mapping[str, Any]) -> Iterator[Path]:
    """The project on the path of modules, with a recipe `tiny` beside its defs.yaml."""
    write_files(folder, {**WRITTEN, **THEIRS})
    write_recipe(folder / "src" / "team" / "defs" / "vision" / "recipes", "tiny", recipe)
    before = sys.path[:]
    sys.path.insert(0, str(folder / "src"))
    try:
        yield folder
    finally:
        sys.path[:] = before
        for name in [n for n in sys.modules if n.partition(".")[0] == "team"]:
            del sys.modules[name]
