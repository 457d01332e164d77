"""Rows with wrong captions are among the hardest samples of the demo, and its held-out loss falls."""

import csv
import json
import random
from collections.abc import Callable
from pathlib import Path

import polars as pl
import pytest
from test_resume import never
from test_resume_kills import demo

from diffsynth_dagster.config.recipe import read_recipe
from diffsynth_dagster.demo.digits import write_new_digits
from diffsynth_dagster.train import run as run_training


def swap_captions(table: Path, part: float) -> set[int]:
    """Give a part of the rows another caption; returns their numbers, from 1."""
    source = random.Random(0)
    rows = list(csv.DictReader(table.open()))
    captions = sorted({row["prompt"] for row in rows})
    chosen = source.sample(range(len(rows)), round(len(rows) * part))
    for number in chosen:
        others = [caption for caption in captions if caption != rows[number]["prompt"]]
        rows[number]["prompt"] = source.choice(others)
    pl.DataFrame(rows).write_csv(table)
    return {number + 1 for number in chosen}


@pytest.mark.parametrize(
    ("repeat", "steps", "least"),
    [(1, [0, 12, 24], 0.4), pytest.param(8, [0, 92, 184], 0.5, marks=pytest.mark.soak)],
)
def test_rows_with_wrong_captions_are_among_the_hardest(
    tmp_path: Path, show: Callable[[str], None], repeat: int, steps: list[int], least: float
) -> None:
    data = tmp_path / "digits_new"
    write_new_digits(data)
    swapped = swap_captions(data / "metadata.csv", 0.1)
    held_out = pl.read_csv(data / "held_out.csv")
    held_out.head(16).write_csv(data / "held_out.csv")
    recipe = demo(
        tmp_path,
        customized_dataset=None,
        customized_evaluation=None,
        sample_prompts=[],
        dataset_repeat=repeat,
        validation_steps=None,
        validation_timesteps=2,
    )
    run_training(read_recipe(recipe).config, never)
    losses = pl.read_parquet(tmp_path / "run" / "sample_losses.parquet")
    hardest = set(losses["row"][: losses.height // 5])
    found = len(hardest & swapped)
    precision, recall = found / len(hardest), found / len(swapped)
    show(f"hardest fifth: precision {precision:.0%}, recall {recall:.0%} (by chance 10 and 20 %)")
    assert recall > least
    measured = json.loads((tmp_path / "run" / "run.json").read_text())["held_out"]
    assert [each["step"] for each in measured] == steps
    assert measured[-1]["loss"] < measured[0]["loss"]
