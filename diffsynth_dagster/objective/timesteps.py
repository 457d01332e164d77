"""How timesteps are drawn (Esser et al. 2024, arXiv:2403.03206, sections 3.1 and 5.3.2).

A place t in [0, 1] is drawn from a density, 1 being the most noise, and stands for an index of the
schedule: index i has the cell [edges[i + 1], edges[i]) of places. Where nothing is shifted the n
cells are of equal size, so that a density over t is one over the schedule as the family has it, with
the family's own shift behind it. A shift moves the edges alone: the sigmas, the timesteps and the
loss weights of the schedule stay what they are, and are only visited more or less often.

The paper's t is used, so that a `logit_mean` above 0 draws more noise. The training scripts of
diffusers take the same number for a place in a schedule that begins with the most noise: there it
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
    """A density of places t in [0, 1].

    Attributes:
        kind: uniform: 1. logit_normal, with the logit of t normal of mean m and deviation s:
            exp(-(logit(t) - m)^2 / (2 s^2)) / (s sqrt(2 pi) t (1 - t)) (section 3.1, equation 19).
            mode: that of f(u) = 1 - u - s (cos^2(pi u / 2) - 1 + u) for a uniform u, which is
            |d f^-1(t) / dt| (equation 20), and uniform for s = 0.
        logit_mean, logit_std: m and s of logit_normal.
        mode_scale: s of mode, from -1 to 2 / (pi - 2), where f is monotone.
    """

    kind: Literal["uniform", "logit_normal", "mode"] = "uniform"
    logit_mean: float = 0.0
    logit_std: float = 1.0
    mode_scale: float = 1.29

    def quantile(self, p: torch.Tensor) -> torch.Tensor:
        """The place below which the part p of the density lies; both float64 of any shape."""
        if self.kind == "logit_normal":
            return torch.special.expit(self.logit_mean + self.logit_std * torch.special.ndtri(p))
        if self.kind == "mode":
            # f falls from 1 to 0, so that its quantile p is f(1 - p).
            u = 1.0 - p
            return 1.0 - u - self.mode_scale * (torch.cos(math.pi * u / 2) ** 2 - 1.0 + u)
        return p

    def below(self, t: torch.Tensor) -> torch.Tensor:
        """The part of the density below t, float64 of any shape: the inverse of `quantile`."""
        if self.kind == "logit_normal":
            return torch.special.ndtr((torch.logit(t) - self.logit_mean) / self.logit_std)
        if self.kind == "uniform":
            return t
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
    """The edges, float64 (n + 1,), by which a place t gets the sigma shift t / (1 + (shift - 1) t) of
    section 5.3.2, equation 23: that shift in the place of any that the schedule has.

    Args:
        sigmas: (n,), of a schedule, decreasing. A cell reaches half way to the next sigmas.
    """
    return _unshifted(_middles(sigmas), shift)


def scaled_edges(sigmas: torch.Tensor, scale: float) -> torch.Tensor:
    """The edges, float64 (n + 1,), by which a place gets the sigma that the schedule has there,
    shifted by `scale`: on a schedule of shift a the two together are the shift a · scale. A scale of
    1 gives `even_edges`.

    For a sample of m pixels the scale is sqrt(m / n) where n is the size that the schedule is for
    (section 5.3.2: the same sigma leaves a larger picture less uncertain).

    Args:
        sigmas: see `shifted_edges`.
    """
    middles = _middles(sigmas)
    own = even_edges(len(sigmas))
    wanted = _unshifted(middles, scale).numpy()
    places = np.interp(wanted, middles.flip(0).numpy(), own.flip(0).numpy())
    return torch.from_numpy(places)


def _middles(sigmas: torch.Tensor) -> torch.Tensor:
    """1, what lies half way between neighbours, 0: float64 (n + 1,)."""
    sigmas = sigmas.double()
    ends = sigmas.new_tensor([1.0]), sigmas.new_tensor([0.0])
    return torch.cat([ends[0], (sigmas[:-1] + sigmas[1:]) / 2, ends[1]])


def _unshifted(sigmas: torch.Tensor, shift: float) -> torch.Tensor:
    """The inverse of t → shift t / (1 + (shift - 1) t)."""
    return sigmas / (shift - (shift - 1.0) * sigmas)


def mass(density: Density, edges: torch.Tensor, low: int, high: int) -> float:
    """The part of a density that falls on the indices [low, high)."""
    bottom, top = _bounds(density, float(edges[high]), float(edges[low]))
    return top - bottom


@lru_cache(maxsize=1 << 12)
def _bounds(density: Density, low: float, high: float) -> tuple[float, float]:
    """The parts of a density below two places: the same for most draws of a training."""
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
    """An index of a share [low, high) of the schedule, drawn from the part of the density there.

    Args:
        edges: see the module; None where a uniform density is not shifted.
    """
    low, high = share
    if edges is None:
        assert density.kind == "uniform"
        return timestep_index(seed, sample, visit, low, high)
    source = generator(seed, "timestep", sample, visit)
    part = torch.rand((), generator=source, dtype=torch.float64)
    bottom, top = _bounds(density, float(edges[high]), float(edges[low]))
    t = density.quantile(bottom + part * (top - bottom))
    above = int((edges[1:] > t).sum())
    return min(max(above, low), high - 1)  # a rounded t may lie just outside
