"""What a materialization of the checkpoints adds to the same training by a bare `accelerate launch`.

    python benchmarks/in_dagster.py
    python benchmarks/in_dagster.py tiny     a trial, of which nothing is written

An epoch of the demo's training, without pictures: by turns in Dagster, from the command to its end,
and by the launcher alone with the same parameters, from the beginning each time. The trial does both
once and in this process, without the launcher around the bare training: only what Dagster launches
is a process of its own.
"""

import csv
import os
import runpy
import shutil
import statistics
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import report
from demo_runs import ROOT, training_of, write_digits

from diffsynth_dagster.config.recipe import dump_config

LOCATION = "diffsynth_dagster.definitions"
TURNS = 3
RETRAIN = '{"ops": {"measured__checkpoints": {"config": {"retrain": true}}}}'
LAUNCH = [
    "accelerate.commands.launch",
    *("--quiet", "--num_processes", "1", "--num_machines", "1", "--mixed_precision", "no"),
    *("--dynamo_backend", "no", "--num_cpu_threads_per_process", str(os.cpu_count()), "-m"),
]


def in_process(command: list[str], folder: Path) -> None:
    """Run a command of Python in the project's root as a process, to its end."""
    env = {**os.environ, **variables(folder)}
    subprocess.run([sys.executable, "-m", *command], cwd=ROOT, env=env, check=True)


def here(command: list[str], folder: Path) -> None:
    """Run a command of Python in this process, which then is as it was before."""
    module, *arguments = command
    arguments_before, sys.argv = sys.argv, [module, *arguments]
    variables_before = {name: os.environ.get(name) for name in variables(folder)}
    os.environ.update(variables(folder))
    location = sys.modules.pop(LOCATION, None)  # of other recipes, where it was imported
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Dagster prefers another command
            runpy.run_module(module, run_name="__main__")
    except SystemExit as done:
        if done.code:
            raise
    finally:
        sys.argv = arguments_before
        for name, value in variables_before.items():
            del os.environ[name]
            if value is not None:
                os.environ[name] = value
        sys.modules.pop(LOCATION, None)
        if location is not None:
            sys.modules[LOCATION] = location


def variables(folder: Path) -> dict[str, str]:
    """A Dagster instance and recipes of its own."""
    return {
        "DAGSTER_HOME": str(folder / "home"),
        "DIFFSYNTH_DAGSTER_RECIPES": str(folder / "recipes"),
    }


def materialize(select: str, *more: str) -> list[str]:
    """The command that materializes assets of the recipe."""
    chosen = ["--select", select, "-m", LOCATION]
    return ["dagster", "asset", "materialize", *chosen, *more]


def measure(folder: Path, tiny: bool) -> list[dict[str, Any]]:
    """Encode once, and train by turns."""
    length = {"dataset_repeat": 2, "num_epochs": 1}
    config = training_of(folder / "digits", folder, tiny, **length)
    run = here if tiny else in_process
    (folder / "recipes").mkdir()
    recipe = folder / "recipes" / "measured.yaml"
    recipe.write_text(dump_config(config), encoding="utf-8")
    (folder / "home").mkdir()
    shutil.copy(ROOT / "dagster_home" / "dagster.yaml", folder / "home")
    trainer = ["diffsynth_dagster.train", "--recipe", str(recipe)]
    encode = [*trainer, "--task", "sft:data_process"]
    run(encode if tiny else materialize("*measured/checkpoints"), folder)
    launched = [*trainer, "--resume", "never", "--output_path", str(folder / "bare")]
    ways = {
        "accelerate launch": launched if tiny else [*LAUNCH, *launched],
        "dagster asset materialize": materialize("measured/checkpoints", "--config-json", RETRAIN),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(1 if tiny else TURNS):
        for name, command in ways.items():
            seconds[name].append(report.timed(lambda command=command: run(command, folder))[0])
    losses = [last_loss(folder / name) for name in ("bare", "trained")]
    typical = [statistics.median(each) for each in seconds.values()]
    return [
        {
            "what": name,
            "seconds": round(took, 2),
            "more": f"{took - typical[0]:+.2f} s",
            "last loss": loss,
        }
        for name, took, loss in zip(ways, typical, losses, strict=True)
    ]


def last_loss(run_folder: Path) -> float:
    """The loss of the last step of a training: of two that are the same, it is the same."""
    with (run_folder / "metrics.csv").open() as file:
        return round(float(list(csv.DictReader(file))[-1]["loss"]), 3)


def main(tiny: bool) -> dict[str, Any]:
    """Measure, and print the table."""
    folder = Path(tempfile.mkdtemp(prefix="bench-in-dagster-"))
    try:
        write_digits(folder / "digits", tiny)
        rows = measure(folder, tiny)
    finally:
        shutil.rmtree(folder)
    print(report.table(rows))
    return {"rows": rows}


if __name__ == "__main__":
    found = report.command_line("in_dagster", main, __doc__)
