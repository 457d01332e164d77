"""Every family and variant leaves samples before, during and after a training."""

import json
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from conftest import make_config, record_of, train
from PIL import Image
from test_families import HUB, Place, each_kind, place, places

from diffsynth_dagster.cache.layout import SAMPLES_FOLDER
from diffsynth_dagster.cache.manifest import read_manifest
from diffsynth_dagster.cache.resolve import Sample, resolve
from diffsynth_dagster.cache.row_sets import reduced_family
from diffsynth_dagster.cache.sampled_rows import SampledRows
from diffsynth_dagster.families.contract import Clip, Family
from diffsynth_dagster.training.sampling import Sampler, strip
from diffsynth_dagster.weights.identify import find_model
from diffsynth_dagster.weights.models import Models

__all__ = ["place", "places"]

EXPERTS = ("wan22_t2v_high", "wan22_i2v_low")
"""Cases of one expert, whose samples the other is needed for."""


def write_table(place: Place, family: Family, path: Path) -> Path:
    """Two rows of what samples need: the first of the data, and the same with the further inputs of
    another row; where there are none, with its prompt."""
    needed = dict.fromkeys(i.column for stage in family.sample_stages for i in stage.reads)
    columns = [name for name in needed if name in place.rows[0]]
    files = [i.column for i in family.file_inputs if i.column in columns]
    first, second = ({name: row[name] for name in columns} for row in place.rows[:2])
    other = {**first, **{name: second[name] for name in files or ["prompt"]}}
    path = path.with_suffix(place.data.suffix)
    if path.suffix == ".csv":
        pl.DataFrame([first, other]).write_csv(path)
    else:
        path.write_text(json.dumps([first, other]))
    return path


class OneRow(SampledRows):
    """A row alone, as the first."""

    def __init__(self, run: Path, row: int) -> None:
        manifest = read_manifest(run / SAMPLES_FOLDER)
        super().__init__(manifest, resolve(manifest, run, "sampled"))
        self._row = row

    def __len__(self) -> int:
        return 1

    def bucket(self, number: int) -> int:
        return super().bucket(number + self._row)

    def at(self, number: int) -> Sample:
        return super().at(number + self._row)


def alone(sampler: Sampler, run: Path, row: int) -> Clip:
    """What the base model makes of a row, with the noise of the first."""
    ((_, clip),) = sampler.make({}, OneRow(run, row), 0)
    return clip


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image, dtype=int)


@each_kind
def test_samples_before_during_and_after(
    place: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    models = place.case.models(place.model, "diffusers")["model_paths"]
    given = place.values(
        model_paths=[*models, *(str(place.model / name) for name in place.case.decoders)],
        batch_size=2,
        sample_num_inference_steps=2,
        sample_cfg_scale=2.0,
        seed=0,
    )
    found = find_model(make_config(given), HUB)
    inputs = reduced_family(found.family).inputs
    if "height" not in given and not found.family.file_inputs[1:]:
        given |= {"height": 64, "width": 64}  # or they would be of the usual size
    given["sample_steps"] = 1
    given["sample_table"] = str(write_table(place, found.family, place.data.parent / "samples"))
    code, run = train(given, tmp_path / "run")
    if place.case.name in EXPERTS:
        assert code == 2
        assert "one expert of Wan2.2 A14B alone" in capsys.readouterr().err
        return
    assert code == 0
    record = record_of(run)
    assert list(record.pictures) == ["step-0", "step-1", "step-2"]
    for name in record.pictures.values():
        assert pixels(Image.open(run / "samples" / name)).std() > 1
    config = make_config({**given, "output_path": str(run)})
    loaded = Models(found, torch.device("cpu"), torch.float32, False, frozenset())
    sampler = Sampler(config, loaded, torch.no_grad)
    first, other = (alone(sampler, run, row) for row in (0, 1))
    # Equal seeds give equal pictures: the first one was made as one of two.
    shown = pixels(strip(first.frames))
    whole = Image.open(run / "samples" / "step-0.png")
    left, top, right, bottom = record.shown[0]["box"]
    # The sample is at the right, below the inputs of a clip.
    box = (right - shown.shape[1], bottom - shown.shape[0], right, bottom)
    assert np.abs(pixels(whole.crop(box)) - shown).max() <= 1
    has_inputs = any(i.is_file and i.kind != "audio" for i in inputs)
    assert ((left, top) != box[:2]) == has_inputs
    assert any(
        np.abs(pixels(a) - pixels(b)).max() > 0
        for a, b in zip(first.frames, other.frames, strict=True)
    )
    assert all(np.isfinite(pixels(frame)).all() for frame in first.frames)
    if first.sound is not None:
        assert torch.isfinite(first.sound).all()
