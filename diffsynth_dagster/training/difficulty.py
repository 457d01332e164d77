"""How hard each row is to learn, from the losses of its visits.

A visit's excess is its loss divided by the usual loss near its timestep, minus 1. Each row has two
means of it: of the visits in the half of the schedule with much noise, and of those in the half
with little. A visit counts the more, the nearer it is to that end. They tell different things:

- At little noise the picture itself decides: one full of detail has a large loss, whatever its
  caption says.
- At much noise the caption and the other conditions decide, as far as they can. But a picture full
  of detail is hard there, too.

So the difficulty of a row is its excess at much noise, less what rows with the same excess at
little noise have: a regression over all rows. Wrong captions come to the front, and good pictures
that are only full of detail go back. A broken picture has far more than the usual excess at little
noise, of which the regression takes no more than a usual one into account.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating[Any]]

_BEFORE = 1.0
"""The weight of an ordinary visit that is counted with the visits of each row: a row that was seen
once or twice is not the hardest by chance."""
_USUAL = 3.0
"""Standard deviations from the middle within which an excess at little noise is usual."""
_FAR = 4.5
"""Standard deviations above the middle from which a row stands out. Difficulties have a long upper
tail without any wrong row: of the demo's 367 rows, none to three are above this bound. With a tenth
of the captions swapped, all 26 rows above it were swapped ones (ten trainings)."""
_LEAST_VISITS = 8
"""Fewer visits do not show that a row's loss stays high."""
_LEAST_ROWS = 10
"""With fewer rows there is nothing to compare a row with."""


@dataclass(frozen=True)
class Difficulties:
    """How hard rows are, each of shape (N,).

    Attributes:
        difficulty: 1 is usual; 1.2 means that at much noise the loss is a fifth larger than that
            of rows which are like it at little noise.
        much_noise, little_noise: the loss of a row's visits near the most and the least noise,
            relative to that of all rows; 1 is usual.
        deviation: how many standard deviations the difficulty is above the middle of all rows.
        stands_out: whether this is far more than usual, after enough visits.
    """

    difficulty: Floats
    much_noise: Floats
    little_noise: Floats
    deviation: Floats
    stands_out: NDArray[np.bool_]


def noise_weight(place: float) -> tuple[int, float]:
    """What a visit counts for, much noise (0) or little noise (1), and how much: nothing in the
    middle of the schedule, and 1 at its ends.

    Args:
        place: of its timestep in the schedule, from 0 (most noise) to 1.
    """
    return int(place >= 0.5), abs(1.0 - 2.0 * place)


def difficulties(sums: Floats, weights: Floats, visits: Floats) -> Difficulties:
    """The difficulties of rows that were visited.

    Args:
        sums: (2, N), the weighted sums of the excesses at much noise and at little noise.
        weights: (2, N), the sums of the weights: see `noise_weight`.
        visits: (N,).
    """
    much, little = (_shrunken(s, w) for s, w in zip(sums, weights, strict=True))
    # Where only timesteps with little noise are trained, these must do.
    excess = much - _explained(much, little) if weights[0].any() else little
    middle, spread = _middle(excess)
    excess = excess - middle
    deviation = excess / spread if spread > 0 else np.zeros_like(excess)
    enough = (visits >= _LEAST_VISITS) & (len(visits) >= _LEAST_ROWS)
    return Difficulties(
        1.0 + excess, 1.0 + much, 1.0 + little, deviation, (deviation > _FAR) & enough
    )


def _shrunken(sums: Floats, weights: Floats) -> Floats:
    """The mean excess (N,) of each row above that of the middle row, nearer to 0 the fewer visits
    it had."""
    seen = weights > 0
    usual, _ = _middle(sums[seen] / weights[seen])
    return (sums - usual * weights) / (weights + _BEFORE)


def _explained(much: Floats, little: Floats) -> Floats:
    """The part (N,) of the excesses at much noise that those at little noise explain."""
    middle, spread = _middle(little)
    usual = _USUAL * spread
    detail = np.clip(little - middle, -usual, usual)
    centred = detail - detail.mean() if len(detail) else detail
    square = float(centred @ centred)
    if len(much) < _LEAST_ROWS or square == 0.0:
        return np.zeros_like(much)
    return max(0.0, float(much @ centred) / square) * detail


def _middle(values: Floats) -> tuple[float, float]:
    """Median and standard deviation, which follows from the median distance to it: a few extreme
    values change neither."""
    if not len(values):
        return 0.0, 0.0
    middle = float(np.median(values))
    return middle, 1.4826 * float(np.median(np.abs(values - middle)))
