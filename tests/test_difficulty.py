"""Which rows are hard and which stand out, from losses that are drawn here."""

from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch

from diffsynth_dagster.training.difficulty import Difficulties, difficulties, noise_weight
from diffsynth_dagster.training.row_losses import RowLosses

RATIO_STD = 0.35
"""How far the losses of equal samples at one timestep differ, as in the demo."""


def visited(much: np.ndarray, little: np.ndarray, visits: int, seed: int = 0) -> Difficulties:
    """The difficulties of rows whose losses at much and at little noise are so far above the usual
    ones (N,), after visits at random timesteps."""
    source = np.random.default_rng(seed)
    sums, weights = np.zeros((2, len(much))), np.zeros((2, len(much)))
    for row in range(len(much)):
        for place in source.random(visits):
            mean = much[row] if place < 0.5 else little[row]
            excess = max(-1.0, mean + RATIO_STD * source.standard_normal())
            kind, weight = noise_weight(place)
            sums[kind, row] += weight * excess
            weights[kind, row] += weight
    return difficulties(sums, weights, np.full(len(much), float(visits)))


def pictures(count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """The excesses of good rows: pictures with more or less detail, which is hard at any noise."""
    source = np.random.default_rng(seed)
    detail = 0.15 * source.standard_normal(count)
    return detail + 0.1 * source.standard_normal(count), detail


def test_wrong_captions_and_broken_pictures_stand_out_and_detail_does_not() -> None:
    much, little = pictures(20)
    much[3] += 1.2  # what a wrong caption does
    much[8], little[8] = 2.0, 5.0  # a picture of noise
    much[12], little[12] = 0.35, 0.35  # full of detail
    found = visited(much, little, 100)
    assert np.flatnonzero(found.stands_out).tolist() == [3, 8]
    assert found.difficulty[12] < 1.15 < 1.2 < found.much_noise[12]
    assert found.little_noise[8] == found.little_noise.max()


def test_good_rows_are_not_named() -> None:
    found = visited(*pictures(2000), 20)
    assert not found.stands_out.any()
    assert float(np.median(found.difficulty)) == pytest.approx(1.0, abs=0.03)


def test_a_single_visit_names_no_row_but_brings_wrong_ones_forward() -> None:
    much, little = pictures(3000)
    much[:300] += 1.0
    found = visited(much, little, 1)
    assert not found.stands_out.any()
    hardest = np.argsort(-found.difficulty)[:600]
    assert (hardest < 300).mean() > 0.15, "by chance it is a tenth"


def test_a_part_of_the_schedule_is_enough() -> None:
    much, little = pictures(100)
    wrong = np.zeros(100)
    wrong[5] = 1.0
    # An expert that is trained where there is much noise, and one where there is little.
    for kind in (0, 1):
        sums, weights = np.zeros((2, 100)), np.zeros((2, 100))
        weights[kind] = 20.0
        sums[kind] = 20.0 * (wrong + (much, little)[kind])
        found = difficulties(sums, weights, np.full(100, 40.0))
        assert np.flatnonzero(found.stands_out).tolist() == [5]
        assert found.difficulty.argmax() == 5


@pytest.mark.parametrize("rows", [0, 1, 3])
def test_a_few_rows(rows: int) -> None:
    found = visited(*pictures(rows), 50)
    assert len(found.difficulty) == rows
    assert not found.stands_out.any()
    assert np.isfinite(found.deviation).all()


def test_equal_rows() -> None:
    nothing = np.zeros((2, 50))
    found = difficulties(nothing, nothing + 12.0, np.full(50, 48.0))
    assert (found.difficulty == 1.0).all()
    assert not found.stands_out.any()


class Rows:
    """Samples of which only the rows are known."""

    def __len__(self) -> int:
        return 4

    def rows(self) -> np.ndarray:
        return np.arange(1, 5, dtype=np.uint32)


def test_a_state_of_an_older_version_is_gone_on_with() -> None:
    """It counted in another way: the rows are counted from there on."""
    losses = RowLosses(cast(Any, Rows()), 1000)
    before = {"sums": torch.ones(4), "visits": torch.full((4,), 9.0)}
    losses.restore({**before, "means": torch.ones(20), "counts": torch.ones(20)}, True)
    batch = SimpleNamespace(scale=1.0, places=[2], indices=[30])
    losses.add(cast(Any, batch), torch.tensor([1.5]), None)
    alone = SimpleNamespace(num_processes=1, sum=lambda tensor: tensor.clone())
    pieces = losses.pieces(cast(Any, alone))
    assert pieces["visits"].tolist() == [0.0, 0.0, 1.0, 0.0]
    assert float(pieces["means"][0]) == pytest.approx(1.5)


def test_timesteps_make_no_row_hard() -> None:
    """A loss that depends on nothing else, and much on it, is usual for each row."""
    source = np.random.default_rng(0)
    losses = RowLosses(cast(Any, Rows()), 1000)
    for _ in range(1000):
        index = int(source.integers(1000))
        batch = SimpleNamespace(scale=1.0, places=[int(source.integers(4))], indices=[index])
        losses.add(cast(Any, batch), torch.tensor([0.3 * index / 1000]), None)
    alone = SimpleNamespace(num_processes=1, sum=lambda tensor: tensor.clone())
    pieces = losses.pieces(cast(Any, alone))
    excess = (pieces["sums"] / pieces["weights"]).numpy()
    assert np.abs(excess - excess.mean(1, keepdims=True)).max() < 0.05
