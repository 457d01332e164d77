"""How much a row counts in the loss, and which parts of it: weights and masks from columns."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from conftest import Values, make_config, train_to_end, why_refused, write_images
from families.wanvideo.cases import CASES as WAN
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file
from test_captions import Encoded, encoded

from diffsynth_dagster.cache.manifest import read_manifest
from diffsynth_dagster.data.media.image import load_sample_image
from diffsynth_dagster.dry_run import make_plan
from diffsynth_dagster.errors import ParameterError
from diffsynth_dagster.objective.loss import sample_losses
from diffsynth_dagster.training.batches import Batch
from diffsynth_dagster.training.build import build_step
from diffsynth_dagster.weights.models import Models

WEIGHTS = ("1", "0.5", "0", "2.25")
SIZE = (80, 64)
"""Of the pictures, in pixels; they are trained at 32x32, so that they are cropped."""


def write_table(folder: Path, **columns: Sequence[Any]) -> Path:
    """A row for each picture, with these columns beside."""
    count = len(next(iter(columns.values())))
    images, prompts = [f"{n}.png" for n in range(count)], [f"picture {n}" for n in range(count)]
    path = folder / f"{'-'.join(columns)}.csv"
    pl.DataFrame({"image": images, "prompt": prompts, **columns}).write_csv(path)
    return path


def write_grey(path: Path, pixels: np.ndarray) -> str:
    Image.fromarray(pixels.astype(np.uint8)).save(path)
    return path.name


@pytest.fixture
def pictured(values: Values, tmp_path: Path) -> dict[str, Any]:
    folder = write_images(tmp_path / "pictures", 4, [SIZE])
    return values(
        dataset_base_path=str(folder),
        dataset_metadata_path=str(write_table(folder, nothing=["-"] * 4)),
        height=32,
        width=32,
    )


def with_column(values: dict[str, Any], name: str, column: Sequence[Any]) -> dict[str, Any]:
    """The parameters with a column that they name, whose name is that of the parameter."""
    table = write_table(Path(values["dataset_base_path"]), **{name: column})
    return {**values, "dataset_metadata_path": str(table), name: name}


def batch_of(place: Encoded) -> Batch:
    (batch,) = place.data()[0]
    return batch


def losses(place: Encoded) -> dict[str, float]:
    """Sample → its loss in the first step, before anything is trained."""
    models = Models(place.found, torch.device("cpu"), torch.float32, False, frozenset(["dit"]))
    torch.manual_seed(0)
    step, batch = build_step(place.config, models, torch.float32), batch_of(place)
    return dict(zip(batch.samples, step(batch).tolist(), strict=True))


def by_row(place: Encoded) -> dict[str, int]:
    frame = read_manifest(place.run).frame
    return dict(zip(frame["sample"], frame["row"], strict=True))


@given(st.integers(0, 2**31), st.booleans(), st.sampled_from([(3, 4, 4), (2, 3, 4, 4)]))
def test_the_loss_is_the_mean_over_what_counts(
    seed: int, is_known: bool, shape: tuple[int, ...]
) -> None:
    source = torch.Generator().manual_seed(seed)
    prediction, target = (torch.randn(2, *shape, generator=source) for _ in range(2))
    mask = torch.rand(2, *(1,) * (len(shape) - 2), 4, 4, generator=source)
    mask = torch.where(mask < 0.4, 0.0, mask)
    known = (torch.rand(2, *shape, generator=source) < 0.3).float() if is_known else None
    weight = torch.tensor([2.0, 0.5])
    found = sample_losses(prediction, target, weight, known, mask)
    for sample in range(2):
        total = counted = 0.0
        for at in np.ndindex(*shape):
            count = float(mask[sample][(*(0,) * (len(shape) - 2), *at[-2:])])
            count *= 1.0 - float(known[sample][at]) if known is not None else 1.0
            total += count * float(prediction[sample][at] - target[sample][at]) ** 2
            counted += count
        assert float(found[sample]) == pytest.approx(
            float(weight[sample]) * total / counted, rel=1e-4
        )


def test_where_nothing_counts_the_loss_is_zero() -> None:
    error, black = torch.ones(1, 1, 2, 2), torch.zeros(1, 1, 2, 2)
    assert float(sample_losses(error, black, torch.ones(1), mask=black)) == 0.0
    faint = torch.full((1, 1, 2, 2), 1e-3)
    assert float(sample_losses(error, black, torch.ones(1), mask=faint)) == pytest.approx(1.0)


def test_a_weight_multiplies_the_loss_of_its_row(pictured: dict[str, Any], tmp_path: Path) -> None:
    plain = encoded(pictured, tmp_path / "plain")
    weighed = encoded(with_column(pictured, "sample_weight_column", WEIGHTS), tmp_path / "weighed")
    without, found = losses(plain), losses(weighed)
    rows = by_row(weighed)
    assert rows == by_row(plain)  # the samples, and so their noise, are the same
    assert len(found) == 4
    for sample, loss in found.items():
        assert loss == pytest.approx(float(WEIGHTS[rows[sample] - 1]) * without[sample], rel=1e-6)


def test_ones_and_white_masks_train_the_same(pictured: dict[str, Any], tmp_path: Path) -> None:
    folder = Path(pictured["dataset_base_path"])
    white = write_grey(folder / "white.png", np.full(SIZE[::-1], 255))
    given = {
        "plain": pictured,
        "ones": with_column(pictured, "sample_weight_column", ["1"] * 4),
        "white": with_column(pictured, "loss_mask_column", [white, "", white, ""]),
    }
    ends: dict[str, dict[str, torch.Tensor]] = {}
    for name, values in given.items():
        run = train_to_end(values, tmp_path / name)
        ends[name] = load_file(run / "epoch-0.safetensors")
    for name, tensor in ends["plain"].items():
        assert torch.equal(ends["ones"][name], tensor)
        torch.testing.assert_close(ends["white"][name], tensor, rtol=1e-4, atol=1e-7)


def test_a_mask_and_its_complement_make_up_the_whole(
    pictured: dict[str, Any], tmp_path: Path
) -> None:
    folder = Path(pictured["dataset_base_path"])
    source = np.random.default_rng(0)
    pixels = [source.integers(0, 256, SIZE[::-1]) for _ in range(4)]
    one = [write_grey(folder / f"mask{n}.png", p) for n, p in enumerate(pixels)]
    other = [write_grey(folder / f"other{n}.png", 255 - p) for n, p in enumerate(pixels)]
    whole = losses(encoded(pictured, tmp_path / "plain"))
    places = [
        encoded(with_column(pictured, "loss_mask_column", masks), tmp_path / masks[0])
        for masks in (one, other)
    ]
    batches = [batch_of(place) for place in places]
    parts = [losses(place) for place in places]
    counts = [b.outputs["loss_mask"].flatten(1).sum(1) for b in batches]
    size = float(batches[0].outputs["loss_mask"][0].numel())
    for index, sample in enumerate(batches[0].samples):
        assert batches[1].samples[index] == sample
        one_, other_ = float(counts[0][index]), float(counts[1][index])
        assert one_ + other_ == pytest.approx(size, rel=2e-2)  # as resizing rounds to 8 bits
        both = (parts[0][sample] * one_ + parts[1][sample] * other_) / (one_ + other_)
        assert both == pytest.approx(whole[sample], rel=3e-2)
        assert parts[0][sample] != pytest.approx(whole[sample], rel=1e-6)


@pytest.mark.parametrize("factor", [1, 2])
def test_a_mask_is_resized_and_cropped_as_its_picture(
    pictured: dict[str, Any], tmp_path: Path, factor: int
) -> None:
    """The masks are the pictures themselves, or those at twice the size: their places are the mean
    grey of what the VAE is shown there."""
    folder = Path(pictured["dataset_base_path"])
    names: list[str] = []
    for n in range(4):
        coarse = np.random.default_rng(n).integers(0, 256, (4, 5))
        picture = np.kron(coarse, np.ones((16, 16))).astype(np.uint8)
        write_grey(folder / f"{n}.png", picture)
        names.append(write_grey(folder / f"m{n}.png", np.kron(picture, np.ones((factor, factor)))))
    place = encoded(with_column(pictured, "loss_mask_column", names), tmp_path)
    batch, rows = batch_of(place), by_row(place)
    for index, sample in enumerate(batch.samples):
        shown = load_sample_image(folder / f"{rows[sample] - 1}.png", (32, 32))
        expected = ((shown[0] + 1) / 2).view(4, 8, 4, 8).mean((1, 3))
        found = batch.outputs["loss_mask"][index]
        assert found.shape == (1, 4, 4)
        torch.testing.assert_close(found[0], expected, atol=0.02 * factor, rtol=0)


def test_one_picture_masks_all_frames(tmp_path: Path) -> None:
    (case,) = (case for case in WAN if case.name == "wan_t2v")
    case.write(tmp_path / "model")
    table = case.rows(tmp_path / "data")
    frame = pl.read_csv(table)
    values = {
        "family": case.family,
        "dataset_base_path": str(table.parent),
        "dataset_metadata_path": str(table),
        "lora_base_model": "dit",
        "lora_rank": 4,
        "cache_path": str(tmp_path / "cache"),
        **case.models(tmp_path / "model", "diffusers"),
        **case.parameters,
    }
    plain = encoded(values, tmp_path / "plain")
    checked = pl.read_parquet(plain.run / "metadata.parquet")
    size = (checked["video:height"][0], checked["video:width"][0])
    half = np.zeros(size)
    half[:, : size[1] // 2] = 255
    name = write_grey(table.parent / "half.png", half)
    frame.with_columns(pl.lit(name).alias("mask")).write_csv(table)
    place = encoded({**values, "loss_mask_column": "mask"}, tmp_path / "masked")
    batch = place.data()[0][0]
    mask, video = batch.outputs["loss_mask"], batch.outputs["video"]
    assert mask.shape == (len(video), 1, 1, *video.shape[-2:])
    assert float(mask.mean()) == pytest.approx(0.5, abs=0.1)
    assert bool((mask[..., 0] == 1).all())
    assert bool((mask[..., -1] == 0).all())
    train_to_end({**values, "loss_mask_column": "mask"}, tmp_path / "run")


def test_rows_with_wrong_values_are_rejected(pictured: dict[str, Any], tmp_path: Path) -> None:
    folder = Path(pictured["dataset_base_path"])
    write_images(tmp_path / "more", 6, [SIZE])
    for path in (tmp_path / "more").glob("*.png"):
        path.rename(folder / path.name)
    weights = ["1", "-1", "much", "", "1e3", "0.5"]
    place = encoded(
        {**with_column(pictured, "sample_weight_column", weights), "max_rejected_fraction": 0.9},
        tmp_path / "weights",
    )
    checked = pl.read_parquet(place.run / "metadata.parquet")
    wrong = ["not_taken", "not_a_number", "not_a_number", "not_a_number"]
    assert checked["status"].to_list() == ["ok", *wrong, "ok"]
    assert "takes a number from 0 to 999999" in checked["message"][1]
    tall = write_grey(folder / "tall.png", np.full((80, 64), 255))
    near = write_grey(folder / "near.png", np.full((33, 40), 255))
    black = write_grey(folder / "black.png", np.zeros(SIZE[::-1]))
    masks = [black, tall, "gone.png", "", near, "https://a.b/c.png"]
    place = encoded(
        {**with_column(pictured, "loss_mask_column", masks), "max_rejected_fraction": 0.9},
        tmp_path / "masks",
    )
    checked = pl.read_parquet(place.run / "metadata.parquet")
    assert checked["status"].to_list() == [
        "ok",
        "other_proportions",
        "file_missing",
        "ok",
        "ok",
        "url",
    ]
    assert "64x80 pixels have other proportions than the 80x64 of image" in checked["message"][1]


@pytest.mark.parametrize("name", ["sample_weight_column", "loss_mask_column"])
@pytest.mark.parametrize("column", ["image", "prompt", "row", "tokens", "image:path"])
def test_a_name_that_is_taken_is_refused(pictured: dict[str, Any], name: str, column: str) -> None:
    with pytest.raises(ParameterError, match=f"the column '{column}' is read as something else"):
        make_plan(make_config({**pictured, name: column}))


@pytest.mark.parametrize("name", ["sample_weight_column", "loss_mask_column"])
def test_a_column_that_is_not_there_is_named(
    pictured: dict[str, Any], tmp_path: Path, name: str
) -> None:
    assert "the metadata has no column 'nothin'; did you mean 'nothing'?" in why_refused(
        {**pictured, name: "nothin"}, tmp_path / "run"
    )


def test_the_second_half_takes_the_columns_over(pictured: dict[str, Any], tmp_path: Path) -> None:
    folder = Path(pictured["dataset_base_path"])
    half = np.zeros(SIZE[::-1])
    half[:32] = 255
    mask = write_grey(folder / "half.png", half)
    table = write_table(folder, weight=WEIGHTS, mask=[mask, "", mask, mask])
    named = {"sample_weight_column": "weight", "loss_mask_column": "mask"}
    config = {**pictured, "dataset_metadata_path": str(table), **named}
    train_to_end(config, tmp_path / "whole")
    train_to_end(config, tmp_path / "encoded", "--task", "sft:data_process")
    left = ("dataset_metadata_path", "height", "width", *named)
    second = {k: v for k, v in config.items() if k not in left}
    second |= {"task": "sft:train", "dataset_base_path": str(tmp_path / "encoded")}
    second["model_paths"] = config["model_paths"][:1]
    train_to_end(second, tmp_path / "split")
    ends = [load_file(tmp_path / n / "epoch-0.safetensors") for n in ("whole", "split")]
    assert all(torch.equal(ends[1][name], tensor) for name, tensor in ends[0].items())
    plain = {**pictured, "dataset_metadata_path": str(table)}
    train_to_end(plain, tmp_path / "plain")
    other = load_file(tmp_path / "plain" / "epoch-0.safetensors")
    assert any(not torch.equal(other[name], tensor) for name, tensor in ends[0].items())


def test_a_mask_follows_a_vae_that_is_trained(pictured: dict[str, Any], tmp_path: Path) -> None:
    """Its stage then runs in the step, behind that of the latents."""
    folder = Path(pictured["dataset_base_path"])
    half = np.zeros(SIZE[::-1])
    half[:32] = 255
    mask = write_grey(folder / "half.png", half)
    values = with_column(pictured, "loss_mask_column", [mask, "", mask, mask])
    values = {k: v for k, v in values.items() if not k.startswith("lora_")}
    run = train_to_end(
        {**values, "trainable_models": ["vae"], "learning_rate": 1e-6}, tmp_path / "r"
    )
    assert "key:loss_mask" not in read_manifest(run).frame.columns
