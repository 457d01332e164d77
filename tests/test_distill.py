"""Direct distillation: the student samples as its family's published pipeline does."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
from conftest import train, train_to_end, why_refused
from families.flux.cases import CASES as FLUX
from families.flux.cases import sampled as flux_sampled
from families.qwen_image.cases import CASES as QWEN
from families.qwen_image.cases import sampled as qwen_sampled
from families.wanvideo.cases import CASES as WAN
from families.wanvideo.cases import sampled as wan_sampled
from family_case import Case
from test_families import Place

from diffsynth_dagster.data.columns import Input
from diffsynth_dagster.data.samples import parse_value
from diffsynth_dagster.families.contract import Tensors

COLUMNS = ("seed", "rand_device", "num_inference_steps", "cfg_scale")


@dataclass(frozen=True)
class Distilled:
    """A family that can be distilled.

    Attributes:
        sampled: (model's folder, row) → the latents in which diffusers' own pipeline ends without
            guidance, from the noise of the row's seed and in its number of steps; by target and
            without a batch dimension.
    """

    case: Case
    sampled: Callable[[Path, Mapping[str, Any]], Tensors]


TABLE = (
    Distilled(QWEN[0], qwen_sampled),
    Distilled(FLUX[0], flux_sampled),
    Distilled(WAN[0], wan_sampled),
)


@pytest.fixture(scope="module", params=TABLE, ids=lambda row: row.case.name)
def distilled(request: pytest.FixtureRequest) -> Distilled:
    return request.param


@pytest.fixture(scope="module")
def place(distilled: Distilled, tmp_path_factory: pytest.TempPathFactory) -> Place:
    """Its rows, with the columns of a teacher and different numbers of steps."""
    case, folder = distilled.case, tmp_path_factory.mktemp(distilled.case.name)
    case.write(folder / "model")
    made = Place(case, folder / "model", case.rows(folder / "data"), folder)
    rows = [
        {**row, "seed": 7 + n, "rand_device": "cpu", "num_inference_steps": 2 + n % 2}
        for n, row in enumerate(made.rows)
    ]
    return Place(case, made.model, write_rows(folder / "data" / "distilled.json", rows), folder)


def write_rows(table: Path, rows: list[dict[str, Any]], cfg_scale: int = 1) -> Path:
    table.write_text(json.dumps([{**r, "cfg_scale": cfg_scale} for r in rows]), encoding="utf-8")
    return table


def values_of(place: Place, **overrides: Any) -> dict[str, Any]:
    """The parameters of a distillation of all rows in one batch."""
    own = place.case.parameters.get("extra_inputs", "").split(",")
    extra = [name for name in (*own, *COLUMNS) if name]
    values = {"task": "direct_distill", "extra_inputs": extra, "batch_size": 4}
    return place.values(**{**values, **overrides})


def test_split_equals_whole(place: Place, tmp_path: Path) -> None:
    train_to_end(values_of(place, cache_path=str(tmp_path / "a")), tmp_path / "whole")
    for task in ("direct_distill:data_process", "direct_distill:train"):
        values = values_of(place, task=task, cache_path=str(tmp_path / "b"))
        train_to_end(values, tmp_path / "split")
    whole = (tmp_path / "whole" / "epoch-0.safetensors").read_bytes()
    assert whole == (tmp_path / "split" / "epoch-0.safetensors").read_bytes()


def test_the_loss_is_the_distance_from_what_the_pipeline_makes(
    place: Place, distilled: Distilled, tmp_path: Path
) -> None:
    """Of the student before it is trained; training then lowers it."""
    _, found, data = place.encoded(batch_size=4)
    visits = [visit for micro in data.order.step(0) for visit in micro]
    assert len(visits) == len(place.rows) == 4
    expected = 0.0
    for visit in visits:
        number = data._samples.at(visit.bucket, visit.index).row
        row = dict(place.rows[number - 1])
        for item in found.family.file_inputs:
            row[item.column] = str(place.data.parent / row[item.column])
        outputs = data._batch([visit], "dit", 1.0).outputs
        for name, latents in distilled.sampled(place.model, row).items():
            assert latents.shape == outputs[name][0].shape
            expected += float(((latents - outputs[name][0]) ** 2).mean()) / len(visits)
    run = train_to_end(values_of(place, num_epochs=4, save_steps=4), tmp_path / "run")
    loss = pl.read_csv(run / "metrics.csv")["loss"].to_list()
    assert abs(loss[0] - expected) <= 1e-5 * expected
    assert loss[-1] < loss[0]
    assert all(torch.isfinite(torch.tensor(loss)))


def test_guidance_is_refused(place: Place, tmp_path: Path) -> None:
    table = write_rows(place.data.with_name("guided.json"), place.rows, cfg_scale=2)
    values = values_of(place, dataset_metadata_path=str(table))
    error = why_refused(values, tmp_path / "run")
    assert "row 1: cfg_scale takes 1, since a student samples without guidance" in error
    assert "Traceback" not in error


def test_one_step_is_a_number(distilled: Distilled, place: Place) -> None:
    """diffusers stretches the sigmas of a single step by nought over nought."""
    family = place.found().family
    assert family.inference_sigmas is not None
    sigmas = family.inference_sigmas(1, {"image": torch.zeros(1, 16, 4, 4)})
    assert sigmas.tolist() == [1.0, 0.0]


def test_data_encoded_for_another_task_is_refused(place: Place, tmp_path: Path) -> None:
    values = values_of(place, task="sft:data_process", extra_inputs=[])
    _, encoded = train(values, tmp_path / "encoded")
    values = values_of(place, task="direct_distill:train", dataset_base_path=str(encoded))
    del values["dataset_metadata_path"]
    assert "encoded with extra_inputs = []" in why_refused(values, tmp_path / "run")
    # The teacher's noise was not drawn, whatever is asked for.
    values = values_of(place, task="direct_distill:train", dataset_base_path=str(encoded))
    del values["dataset_metadata_path"], values["extra_inputs"]
    assert "encoded without what this training reads: teacher" in why_refused(
        values, tmp_path / "run"
    )


def test_large_seeds_are_exact() -> None:
    seed = 2**53 + 1
    assert parse_value(str(seed), Input("seed", "number")) == seed
    assert parse_value("4.0", Input("seed", "number")) == 4
