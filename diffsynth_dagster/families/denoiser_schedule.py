"""How the denoisers of a model share the schedule of timesteps.

Says for each which timesteps it is trained at, how they are drawn, and which optimizer steps go to it.
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
    """The indices [low, high) of the schedule that timesteps are drawn from for a denoiser.

    Attributes:
        drawn: how much of the density of timesteps lies in it; None where that is uniform over the
            schedule.
    """

    component: str
    low: int
    high: int
    drawn: float | None = None

    @property
    def weight(self) -> float:
        """How often steps go to it, beside the other shares'."""
        return float(self.high - self.low) if self.drawn is None else self.drawn


class DenoiserSchedule:
    """Draws the timesteps of a training: see `objective.timesteps`.

    Args:
        noising: its timesteps are drawn from.
        denoisers: those that are trained.

    Attributes:
        shares: the part of the schedule of each denoiser.

    Raises:
        ParameterError: the config leaves a denoiser no timestep, or asks for what the schedule does
            not have.
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
        self._usual_pixels = 0
        self._edges: torch.Tensor | None = None
        if config.timestep_shift is not None and noising.sigmas is None:
            raise ParameterError(
                f"the schedule of {family.name} has no sigmas that are shifted: it is one of betas",
                where="timestep_shift",
                do="leave it out",
            )
        if config.timestep_shift == "resolution":
            width, height = family.geometry.sample_size
            self._usual_pixels = width * height
        elif config.timestep_shift is not None:
            assert noising.sigmas is not None
            self._edges = shifted_edges(noising.sigmas, config.timestep_shift)
        elif config.timestep_sampling != "uniform":
            self._edges = even_edges(len(noising.timesteps))
        self.shares = self._shares(config, noising, denoisers)

    def index(self, share: Share, sample: str, visit: int, pixels: int) -> int:
        """The index of a visit of a sample.

        Args:
            pixels: of the sample's picture, or of a frame of its clip.
        """
        edges = self._edges
        if self._usual_pixels:
            assert self._sigmas is not None
            edges = scaled_edges(self._sigmas, (pixels / self._usual_pixels) ** 0.5)
        return draw_index(self._seed, sample, visit, (share.low, share.high), self._density, edges)

    def _shares(
        self, config: TrainingConfig, noising: Noising, denoisers: Sequence[Denoiser]
    ) -> tuple[Share, ...]:
        count = len(noising.timesteps)
        low = int(config.min_timestep_boundary * count)
        high = int(config.max_timestep_boundary * count)
        if self._usual_pixels and len(denoisers) > 1:
            raise ParameterError(
                "the denoisers would share the steps otherwise for every size of a sample",
                where="timestep_shift = resolution",
                do="give a number, or train one of them",
            )
        shares: list[Share] = []
        for denoiser in denoisers:
            own = (noising.timesteps >= denoiser.low) & (noising.timesteps < denoiser.high)
            indices = torch.nonzero(own).flatten().tolist()
            first, last = max(low, indices[0]), min(high, indices[-1] + 1)
            if first >= last:
                raise ParameterError(
                    f"no timestep is left for '{denoiser.component}'",
                    where="min_timestep_boundary, max_timestep_boundary",
                    do="leave them out: each expert has its own part of the schedule; or train one",
                )
            shares.append(Share(denoiser.component, first, last, self._drawn(first, last)))
            if shares[-1].weight <= 0.0:
                raise ParameterError(
                    f"the timesteps of '{denoiser.component}' are never drawn",
                    where="timestep_sampling, timestep_shift",
                    do="give a logit_mean nearer to 0, a larger logit_std, or other boundaries",
                )
        return tuple(shares)

    def _drawn(self, low: int, high: int) -> float | None:
        # Samples of different sizes have edges of their own, but then there is one share alone.
        return None if self._edges is None else mass(self._density, self._edges, low, high)


def share_of_step(shares: Sequence[Share], seed: int, step: int) -> Share:
    """The share that an optimizer step goes to: as often as its timesteps are drawn.

    All micro-batches of a step go to one denoiser, however they are split among processes. So each
    process has gradients for the same weights, and weights change places once a step at most.

    Args:
        step: counted from 0.
    """
    if len(shares) == 1:
        return shares[0]
    sizes = torch.tensor([share.weight for share in shares])
    source = generator(seed, "denoiser", step)
    return shares[int(torch.multinomial(sizes, 1, generator=source))]
