"""Draw timesteps from a density (Esser et al. 2024, arXiv:2403.03206, sections 3.1 and 5.3.2).

A place t in [0, 1] is drawn from a density; 1 is the most noise. The interval [0, 1] is divided
into n cells, one for each index of the schedule: index i has the cell [edges[i + 1], edges[i]). The
index whose cell contains t is trained.

Without a shift the n cells have equal size: the density is then one over the indices of the
family's schedule, which may contain a shift of its own. A shift moves the edges only. The sigmas,
timesteps and loss weights of the schedule stay the same; they are only drawn more or less often.

t is that of the paper, so a `logit_mean` above 0 draws more noise. The training scripts of
diffusers use the same number as a place in a schedule that begins with the most noise: there it
draws less.

A draw is a function of (seed, sample, visit) and of these settings.
"""

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
import torch

from diffsynth_dagster.objective.noise import generator, timestep_index

_HALVINGS = 60
"""Steps of bisection: more than the bits of a float64 between 0 and 1."""


@dataclass(frozen=True)
class Density:
    """A probability density of t in [0, 1].

    Attributes:
        kind: "uniform": the density is 1.
            "logit_normal": the logit of t is normal with mean m and standard deviation s. The
            density is exp(-(logit(t) - m)^2 / (2 s^2)) / (s sqrt(2 pi) t (1 - t)) (section 3.1,
            equation 19).
            "mode": t = f(u) = 1 - u - s (cos^2(pi u / 2) - 1 + u) for a uniform u. The density is
            |d f^-1(t) / dt| (equation 20); it is uniform for s = 0.
        logit_mean, logit_std: m and s of "logit_normal".
        mode_scale: s of "mode", from -1 to 2 / (pi - 2), where f is monotone.
    """

    kind: Literal["uniform", "logit_normal", "mode"] = "uniform"
    logit_mean: float = 0.0
    logit_std: float = 1.0
    mode_scale: float = 1.29

    def quantile(self, p: torch.Tensor) -> torch.Tensor:
        """The t below which the fraction p of the density lies; both float64 of any shape."""
        if self.kind == "logit_normal":
            return torch.special.expit(self.logit_mean + self.logit_std * torch.special.ndtri(p))
        if self.kind == "mode":
            # f decreases from 1 to 0, so the quantile of p is f(1 - p).
            u = 1.0 - p
            return 1.0 - u - self.mode_scale * (torch.cos(math.pi * u / 2) ** 2 - 1.0 + u)
        return p

    def below(self, t: torch.Tensor) -> torch.Tensor:
        """The fraction of the density below t, float64 of any shape: the inverse of `quantile`."""
        if self.kind == "logit_normal":
            return torch.special.ndtr((torch.logit(t) - self.logit_mean) / self.logit_std)
        if self.kind == "uniform":
            return t
        # f has no inverse in closed form: bisect.
        low, high = torch.zeros_like(t), torch.ones_like(t)
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            under = self.quantile(middle) < t
            low, high = torch.where(under, middle, low), torch.where(under, high, middle)
        return (low + high) / 2


def even_edges(count: int) -> torch.Tensor:
    """The edges of cells of equal size: 1, 1 - 1/n, …, 0 in float64 (n + 1,)."""
    return 1.0 - torch.arange(count + 1, dtype=torch.float64) / count


def shifted_edges(sigmas: torch.Tensor, shift: float) -> torch.Tensor:
    """The edges for which t gets the sigma shift t / (1 + (shift - 1) t) (section 5.3.2, equation
    23). This shift replaces any shift of the schedule.

    Args:
        sigmas: the schedule (n,), decreasing. A cell reaches half way to the next sigmas.

    Returns:
        float64 (n + 1,), decreasing from 1 to 0.
    """
    return _unshifted(_middles(sigmas), shift)


def scaled_edges(sigmas: torch.Tensor, scale: float) -> torch.Tensor:
    """The edges for which t gets the sigma of the schedule at t, shifted further by `scale`.

    On a schedule with shift a, both together are the shift a · scale. A scale of 1 gives
    `even_edges`. For a sample of m pixels the scale is sqrt(m / n), where n is the number of pixels
    that the schedule is meant for: the same sigma hides less of a larger picture (section 5.3.2).

    Args:
        sigmas: the schedule (n,), decreasing.

    Returns:
        float64 (n + 1,), decreasing from 1 to 0.
    """
    middles = _middles(sigmas)
    even = even_edges(len(sigmas))
    # The sigma at each edge before the shift; then the t at which the schedule has that sigma.
    unshifted = _unshifted(middles, scale).numpy()
    # `flip`, since `np.interp` needs increasing values.
    edges = np.interp(unshifted, middles.flip(0).numpy(), even.flip(0).numpy())
    return torch.from_numpy(edges)


def _middles(sigmas: torch.Tensor) -> torch.Tensor:
    """The boundaries between sigmas: 1, the means of neighbours, 0. float64 (n + 1,)."""
    sigmas = sigmas.double()
    ends = sigmas.new_tensor([1.0]), sigmas.new_tensor([0.0])
    return torch.cat([ends[0], (sigmas[:-1] + sigmas[1:]) / 2, ends[1]])


def _unshifted(sigmas: torch.Tensor, shift: float) -> torch.Tensor:
    """The inverse of t → shift t / (1 + (shift - 1) t)."""
    return sigmas / (shift - (shift - 1.0) * sigmas)


def mass(density: Density, edges: torch.Tensor, low: int, high: int) -> float:
    """The probability that a density draws one of the indices [low, high)."""
    bottom, top = _bounds(density, float(edges[high]), float(edges[low]))
    return top - bottom


@lru_cache(maxsize=1 << 12)
def _bounds(density: Density, low: float, high: float) -> tuple[float, float]:
    """The fractions of a density below two places, cached: most draws ask for the same ones."""
    bottom, top = density.below(torch.tensor([low, high], dtype=torch.float64)).tolist()
    return bottom, top


def draw_index(
    seed: int,
    sample: str,
    visit: int,
    share: tuple[int, int],
    density: Density,
    edges: torch.Tensor | None,
) -> int:
    """Draw an index from the part of the density that falls on a share of the schedule.

    Args:
        share: the indices [low, high).
        edges: float64 (n + 1,), see the module; None for a uniform density without a shift.
    """
    low, high = share
    if edges is None:
        # Draw an integer directly, so that the draws stay equal to those of earlier versions.
        assert density.kind == "uniform"
        return timestep_index(seed, sample, visit, low, high)
    source = generator(seed, "timestep", sample, visit)
    fraction = torch.rand((), generator=source, dtype=torch.float64)
    # Inverse transform sampling within the share; larger indices have smaller t.
    bottom, top = _bounds(density, float(edges[high]), float(edges[low]))
    t = density.quantile(bottom + fraction * (top - bottom))
    above = int((edges[1:] > t).sum())  # the number of cells above t is the index of its cell
    return min(max(above, low), high - 1)  # a rounded t may lie just outside
