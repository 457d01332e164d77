"""How the denoisers of a model share the schedule of timesteps.

Decides which timesteps each denoiser is trained at, how they are drawn, and which denoiser each
optimizer step trains.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from diffsynth_dagster.config.parameters import TrainingConfig
from diffsynth_dagster.errors import ParameterError
from diffsynth_dagster.families.contract import Denoiser, Family
from diffsynth_dagster.objective.noise import generator
from diffsynth_dagster.objective.noising import Noising
from diffsynth_dagster.objective.timesteps import (
    Density,
    draw_index,
    even_edges,
    mass,
    scaled_edges,
    shifted_edges,
)


@dataclass(frozen=True)
class Share:
    """The part of the schedule that a denoiser is trained on: the indices [low, high).

    Attributes:
        drawn: the probability mass of the timestep density in this part; None if the density is
            uniform over the indices.
    """

    component: str
    low: int
    high: int
    drawn: float | None = None

    @property
    def weight(self) -> float:
        """How often this denoiser is trained, relative to the weights of the other shares."""
        return float(self.high - self.low) if self.drawn is None else self.drawn


class DenoiserSchedule:
    """Draws the timesteps of a training: see `objective.timesteps`.

    Args:
        noising: the noising path with the schedule to draw from.
        denoisers: the denoisers that are trained.

    Attributes:
        shares: the part of the schedule of each denoiser.

    Raises:
        ParameterError: the config leaves no timestep for a denoiser, or its timestep parameters do
            not fit this schedule.
    """

    def __init__(
        self,
        config: TrainingConfig,
        family: Family,
        noising: Noising,
        denoisers: Sequence[Denoiser],
    ) -> None:
        self._seed = config.seed
        self._density = Density(
            config.timestep_sampling, config.logit_mean, config.logit_std, config.mode_scale
        )
        self._sigmas = noising.sigmas
        self._reference_pixels = 0  # 0: the shift does not depend on the sample's size
        # None: all indices are equally likely, or the edges depend on the sample's size.
        self._edges: torch.Tensor | None = None
        if config.timestep_shift is not None and noising.sigmas is None:
            raise ParameterError(
                f"the schedule of {family.name} has no sigmas that are shifted: it is one of betas",
                where="timestep_shift",
                do="leave it out",
            )
        if config.timestep_shift == "resolution":
            width, height = family.geometry.sample_size
            self._reference_pixels = width * height
        elif config.timestep_shift is not None:
            assert noising.sigmas is not None
            self._edges = shifted_edges(noising.sigmas, config.timestep_shift)
        elif config.timestep_sampling != "uniform":
            self._edges = even_edges(len(noising.timesteps))
        self.shares = self._shares(config, noising, denoisers)

    def index(self, share: Share, sample: str, visit: int, pixels: int) -> int:
        """The index in the schedule to train at a visit of a sample.

        Args:
            pixels: of the sample's picture, or of one frame of its clip.
        """
        edges = self._edges
        if self._reference_pixels:
            assert self._sigmas is not None
            # A larger image needs more noise to hide as much: shift by the ratio of the sides
            # (Esser et al. 2024, arXiv:2403.03206, section 5.3.2).
            edges = scaled_edges(self._sigmas, (pixels / self._reference_pixels) ** 0.5)
        return draw_index(self._seed, sample, visit, (share.low, share.high), self._density, edges)

    def _shares(
        self, config: TrainingConfig, noising: Noising, denoisers: Sequence[Denoiser]
    ) -> tuple[Share, ...]:
        # Boundaries are fractions of the schedule, which starts with the most noise.
        count = len(noising.timesteps)
        low = int(config.min_timestep_boundary * count)
        high = int(config.max_timestep_boundary * count)
        if self._reference_pixels and len(denoisers) > 1:
            raise ParameterError(
                "with several denoisers the shift cannot depend on the size of a sample: each size "
                "would divide the training steps differently among them",
                where="timestep_shift = resolution",
                do="give a number, or train one of them",
            )
        shares: list[Share] = []
        for denoiser in denoisers:
            in_range = (noising.timesteps >= denoiser.low) & (noising.timesteps < denoiser.high)
            # Timesteps fall monotonically, so the matching indices have no gaps.
            indices = torch.nonzero(in_range).flatten().tolist()
            first, last = max(low, indices[0]), min(high, indices[-1] + 1)
            if first >= last:
                raise ParameterError(
                    f"no timestep is left for '{denoiser.component}'",
                    where="min_timestep_boundary, max_timestep_boundary",
                    do="leave them out: each expert has its own part of the schedule; or train one",
                )
            shares.append(Share(denoiser.component, first, last, self._mass(first, last)))
            if shares[-1].weight <= 0.0:
                raise ParameterError(
                    f"the timesteps of '{denoiser.component}' are never drawn",
                    where="timestep_sampling, timestep_shift",
                    do="give a logit_mean nearer to 0, a larger logit_std, or other boundaries",
                )
        return tuple(shares)

    def _mass(self, low: int, high: int) -> float | None:
        # With `timestep_shift = resolution` the edges differ between samples, and `_edges` is None.
        # The mass is not needed then, because there is only one share.
        return None if self._edges is None else mass(self._density, self._edges, low, high)


def share_of_step(shares: Sequence[Share], seed: int, step: int) -> Share:
    """The share that an optimizer step trains, drawn in proportion to the shares' weights.

    All micro-batches of a step train the same denoiser, on all processes. So every process has
    gradients for the same weights, and the offloaded denoiser moves at most once per step.

    Args:
        step: counted from 0.
    """
    if len(shares) == 1:
        return shares[0]
    weights = torch.tensor([share.weight for share in shares])
    # Seeded by the step alone, so all processes and a resumed training draw the same share.
    source = generator(seed, "denoiser", step)
    return shares[int(torch.multinomial(weights, 1, generator=source))]
