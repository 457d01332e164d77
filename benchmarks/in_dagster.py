"""What a materialization of the checkpoints adds to the same training by a bare `accelerate launch`.

    python benchmarks/in_dagster.py

An epoch of the demo's training, without pictures: by turns in Dagster, from the command to its end,
and by the launcher alone with the same parameters, from the beginning each time.
"""

import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import report
from checks import DEMO

from diffsynth_dagster.config.recipe import dump_config, read_recipe

ROOT = DEMO.parents[1]
TURNS = 3
WITHOUT = {
    "customized_evaluation": None,
    "sample_prompts": (),
    "validation_metadata_path": None,
    "validation_steps": None,
}
"""The demo's pictures and measurements, left out."""
SHORT = {"dataset_repeat": 2, "num_epochs": 1}


def run(command: list[str], folder: Path) -> None:
    """Run a command of Python in the project's root, to its end."""
    env = {
        **os.environ,
        "DAGSTER_HOME": str(folder / "home"),
        "DIFFSYNTH_DAGSTER_RECIPES": str(folder / "recipes"),
    }
    subprocess.run([sys.executable, "-m", *command], cwd=ROOT, env=env, check=True)


def materialize(folder: Path, select: str, *more: str) -> None:
    """Materialize assets of the recipe by the command line."""
    chosen = ["--select", select, "-m", "diffsynth_dagster.definitions"]
    run(["dagster", "asset", "materialize", *chosen, *more], folder)


def measure(folder: Path) -> list[dict[str, Any]]:
    """Encode once, and train by turns."""
    paths = {
        "dataset_base_path": str(folder / "digits"),
        "dataset_metadata_path": str(folder / "digits" / "metadata.csv"),
        "cache_path": str(folder / "store"),
        "output_path": str(folder / "trained"),
    }
    config = read_recipe(DEMO).config.model_copy(update={**WITHOUT, **SHORT, **paths})
    (folder / "recipes").mkdir()
    (folder / "recipes" / "measured.yaml").write_text(dump_config(config), encoding="utf-8")
    (folder / "home").mkdir()
    materialize(folder, "*measured/checkpoints")
    retrain = '{"ops": {"measured__checkpoints": {"config": {"retrain": true}}}}'
    launched = shutil.copy(folder / "trained" / "config.yaml", folder / "launched.yaml")
    bare = ["--quiet", "--num_processes", "1", "--num_machines", "1", "--mixed_precision", "no"]
    bare += ["--dynamo_backend", "no", "--num_cpu_threads_per_process", str(os.cpu_count())]
    trainer = ["-m", "diffsynth_dagster.train", "--recipe", launched, "--resume", "never"]
    ways = {
        "accelerate launch": lambda: run(
            ["accelerate.commands.launch", *bare, *trainer, f"--output_path={folder / 'bare'}"],
            folder,
        ),
        "dagster asset materialize": lambda: materialize(
            folder, "measured/checkpoints", "--config-json", retrain
        ),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(TURNS):
        for name, way in ways.items():
            seconds[name].append(report.timed(way)[0])
    alone = statistics.median(seconds["accelerate launch"])
    return [
        {"what": name, "seconds": round(took, 2), "more": f"{took - alone:+.2f} s"}
        for name, each in seconds.items()
        for took in [statistics.median(each)]
    ]


def main() -> None:
    """Measure, and print the table."""
    folder = Path(tempfile.mkdtemp(prefix="bench-in-dagster-"))
    try:
        rows = measure(folder)
    finally:
        shutil.rmtree(folder)
    print(report.table(rows))
    report.write("in_dagster", {"rows": rows})


if __name__ == "__main__":
    sys.exit(main())
