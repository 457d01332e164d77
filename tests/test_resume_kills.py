"""The demo's training, killed at random moments and started again, ends with the bytes that it would have."""

import os
import random
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import yaml
from conftest import ROOT
from soak_support import Attempt, Death, make_attempt, result, start_server

from diffsynth_dagster.config.recipe import read_recipe
from diffsynth_dagster.demo.digits import write_new_digits

STOPPED = 130


def demo(folder: Path, **changes: Any) -> Path:
    """The demo's recipe, which writes into a folder."""
    config = read_recipe(ROOT / "recipes" / "demo.yaml").config.model_dump(
        mode="json", exclude_unset=True
    )
    data = ROOT / config["dataset_base_path"]
    config |= {
        "dataset_base_path": str(folder / data.name),
        "dataset_metadata_path": str(folder / data.name / "metadata.csv"),
        "validation_metadata_path": str(folder / data.name / "held_out.csv"),
        "model_paths": [str(ROOT / path) for path in config["model_paths"]],
        "tokenizer_path": str(ROOT / config["tokenizer_path"]),
        "cache_path": str(folder / "store"),
        "output_path": str(folder / "run"),
    }
    recipe = folder / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({**config, **changes}), encoding="utf-8")
    return recipe


def deaths(source: random.Random, whole: Attempt, kills: int, terms: int) -> list[Death]:
    """When the training is killed: a while after a start, at a touch of any file, or of a state's."""
    chosen = [signal.SIGKILL] * kills + [signal.SIGTERM] * terms
    source.shuffle(chosen)
    found: list[Death] = []
    for by in chosen:
        kind = source.randrange(3)
        if kind == 0:
            found.append(Death(seconds=source.uniform(0.0, whole.seconds / 2), by=by))
        elif kind == 1:
            found.append(Death(touch=source.randint(1, whole.touched // 2), by=by))
        else:
            found.append(Death(touch=source.randint(1, 40), folder="run/state", by=by))
    return found


def killed(recipe: Path, seed: int, kills: int, terms: int) -> Counter[str]:
    """Kill so many times, and start again each time until the training is done; how it went."""
    server, run = start_server(), recipe.parent / "run"
    assert make_attempt(server, "command", recipe).code == 0
    wanted = result(run)
    shutil.rmtree(run)
    whole = make_attempt(server, "command", recipe)  # from the store
    assert result(run) == wanted
    counted: Counter[str] = Counter()
    left = deaths(random.Random(seed), whole, kills, terms)
    while left:
        shutil.rmtree(run)
        code = None
        while code != 0:
            death = left.pop() if left else Death()
            attempt = make_attempt(server, "command", recipe, death)
            code = attempt.code
            assert code in (None, 0, STOPPED, -signal.SIGTERM), (death, attempt)
            counted["killed"] += code is None
            counted["stopped"] += code in (STOPPED, -signal.SIGTERM)
            counted["went on"] += "going on after step" in attempt.said
            counted["while a state was written"] += code != 0 and death.folder != ""
            if code == 0 and death != Death():
                left.append(death)  # it was done before
        counted["compared"] += 1
        assert result(run) == wanted
    return counted


def short(folder: Path) -> Path:
    """The demo's recipe with a sixth of its pictures, one repeat, and what is beside the steps as short
    as it can be."""
    recipe = demo(
        folder,
        customized_dataset=None,
        customized_evaluation=None,
        dataset_repeat=1,
        batch_size=8,
        sample_prompts=["a handwritten eight"],
        state_steps=2,
        validation_steps=None,
        validation_timesteps=1,
        sample_num_inference_steps=1,
    )
    data = folder / "digits_new"
    write_new_digits(data)
    for name, rows in (("metadata.csv", 64), ("held_out.csv", 8)):
        pl.read_csv(data / name).head(rows).write_csv(data / name)
    return recipe


@pytest.mark.parametrize(("kills", "terms"), [(2, 1), pytest.param(30, 10, marks=pytest.mark.soak)])
def test_kills_change_no_byte(
    tmp_path: Path, show: Callable[[str], None], kills: int, terms: int
) -> None:
    counted = killed(short(tmp_path), 0, kills, terms)
    show(f"{kills} kills and {terms} signals: {dict(counted)}")
    assert counted["killed"] == kills
    assert counted["stopped"] == terms
    assert counted["while a state was written"] >= kills // 4
    assert counted["went on"] >= (kills + terms) // 5


@pytest.mark.soak
@pytest.mark.parametrize("half", [0, 1])
def test_three_hundred_kills(tmp_path: Path, show: Callable[[str], None], half: int) -> None:
    """The whole demo, in two halves that may run beside each other. `SOAK_SEED` and `SOAK_KILLS` in the
    environment choose others."""
    seed = int(os.environ.get("SOAK_SEED", random.randrange(1 << 32))) + half
    kills, began = int(os.environ.get("SOAK_KILLS", "300")), time.monotonic()
    kills = kills // 2 if half else kills - kills // 2
    show(f"SOAK_SEED={seed - half}, half {half}")
    counted = killed(demo(tmp_path, state_steps=20), seed, kills - kills // 4, kills // 4)
    show(f"half {half}, {time.monotonic() - began:.0f} s: {dict(counted)}")
    assert counted["killed"] + counted["stopped"] == kills
