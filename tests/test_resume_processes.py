"""A state of some processes is gone on with by others: the steps are those of one undisturbed run."""

import csv
import json
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from conftest import Values, record_of, train_to_end
from PIL import Image
from process_support import two_processes
from safetensors.torch import load_file

SAMPLED = {"sample_num_inference_steps": 2, "sample_cfg_scale": 1.0, "height": 32, "width": 32}
LONG = {"batch_size": 2, "learning_rate": 1e-2, "lora_dropout": 0.0}


def losses(run: Path) -> list[float]:
    with (run / "metrics.csv").open() as file:
        return [float(row["loss"]) for row in csv.DictReader(file)]


def test_two_processes_then_one_then_two(values: Values, tmp_path: Path) -> None:
    """Noise, timesteps and the order of the samples depend on no process; sums do, in their last bits.

    The processes share the sample pictures, of which the second makes the last.
    """
    long = {**LONG, "sample_prompts": ["a picture", "another", "a third"], **SAMPLED}
    alone = values(**long, num_epochs=4, gradient_accumulation_steps=2)
    train_to_end(alone, tmp_path / "alone")
    run = tmp_path / "run"
    for epochs, processes in ((1, 2), (2, 1), (4, 2)):
        config = values(**long, num_epochs=epochs, output_path=str(run))
        if processes == 1:
            train_to_end({**config, "gradient_accumulation_steps": 2}, run)
        else:
            done = two_processes(config, tmp_path / "recipe.json")
            assert done.returncode == 0, done.stderr
            assert done.stderr.count("exported ") == 1, done.stderr
    record = json.loads((run / "run.json").read_text())
    assert record["resumed_from"] == [2, 4]
    assert losses(run) == pytest.approx(losses(tmp_path / "alone"), rel=1e-6)
    counted = (pl.read_parquet(f / "rows.parquet").sort("row") for f in (tmp_path / "alone", run))
    one, other = (table["row", "visits"].rows() for table in counted)
    assert one == other
    for epoch in range(4):
        one, other = (
            load_file(f / f"epoch-{epoch}.safetensors") for f in (tmp_path / "alone", run)
        )
        for name, tensor in one.items():
            torch.testing.assert_close(other[name], tensor, rtol=1e-4, atol=1e-6)
    assert record["shown"] == record_of(tmp_path / "alone").shown
    for name in record["pictures"].values():
        one, other = (
            np.asarray(Image.open(f / "samples" / name), int) for f in (tmp_path / "alone", run)
        )
        assert np.abs(one - other).max() <= 1


@pytest.mark.soak
def test_two_processes_go_on_with_their_own_random_numbers(values: Values, tmp_path: Path) -> None:
    """Those of dropout differ between processes: with as many of them, the bytes are the same."""
    given = {**LONG, "lora_dropout": 0.3, "lora_rank": 8}
    runs = {name: tmp_path / name for name in ("undisturbed", "stopped")}
    for name, all_epochs in (("undisturbed", (3,)), ("stopped", (1, 3))):
        for epochs in all_epochs:
            config = values(**given, num_epochs=epochs, output_path=str(runs[name]))
            done = two_processes(config, tmp_path / "recipe.json")
            assert done.returncode == 0, done.stderr
    first, second = (load_file(run / "epoch-2.safetensors") for run in runs.values())
    assert all(torch.equal(first[name], second[name]) for name in first)
