"""How denoisers share a schedule: the timesteps of each, and the optimizer steps that go to it."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from diffsynth_dagster.config.effect import trained_components
from diffsynth_dagster.config.parameters import TrainingConfig
from diffsynth_dagster.errors import ParameterError
from diffsynth_dagster.families.contract import Family
from diffsynth_dagster.objective.noise import generator
from diffsynth_dagster.objective.path import NoisingPath


@dataclass(frozen=True)
class Share:
    """The indices [low, high) of the schedule that timesteps are drawn from for a denoiser."""

    component: str
    low: int
    high: int


def shares_of(config: TrainingConfig, family: Family, path: NoisingPath) -> tuple[Share, ...]:
    """The denoisers at work, each with its part of the schedule that the config trains.

    Raises:
        ParameterError: the config leaves one of them no timestep.
    """
    count = len(path.timesteps)
    low = int(config.min_timestep_boundary * count)
    high = int(config.max_timestep_boundary * count)
    shares: list[Share] = []
    for denoiser in family.at_work(trained_components(config)):
        own = (path.timesteps >= denoiser.low) & (path.timesteps < denoiser.high)
        indices = torch.nonzero(own).flatten().tolist()
        share = Share(denoiser.component, max(low, indices[0]), min(high, indices[-1] + 1))
        if share.low >= share.high:
            raise ParameterError(
                f"no timestep is left for '{denoiser.component}'",
                where="min_timestep_boundary, max_timestep_boundary",
                do="leave them out: each expert has its own part of the schedule; or train one",
            )
        shares.append(share)
    return tuple(shares)


def share_of_step(shares: Sequence[Share], seed: int, step: int) -> Share:
    """The share that an optimizer step goes to: as often as it has timesteps.

    All micro-batches of a step go to one denoiser, however they are split among processes. So each
    process has gradients for the same weights, and weights change places once a step at most.

    Args:
        step: counted from 0.
    """
    if len(shares) == 1:
        return shares[0]
    sizes = torch.tensor([float(share.high - share.low) for share in shares])
    source = generator(seed, "denoiser", step)
    return shares[int(torch.multinomial(sizes, 1, generator=source))]
