"""Flow matching with a sigma schedule.

The notation is that of rectified flow (Liu et al. 2022, arXiv:2209.03003; Esser et al. 2024,
arXiv:2403.03206): x_0 are clean latents, epsilon ~ N(0, 1), sigma is in [0, 1],
x_t = (1 - sigma) x_0 + sigma epsilon, and the model predicts the velocity epsilon - x_0.
The schedules and loss weights are those of DiffSynth-Studio's supervised loss, so that both
trainers minimise the same loss.
"""

import math
from dataclasses import dataclass

import torch

from diffsynth_dagster.objective.noising import at_index

NUM_TRAIN_TIMESTEPS = 1000


def exponential_shift(sigmas: torch.Tensor, mu: float) -> torch.Tensor:
    """sigma -> e^mu / (e^mu + 1 / sigma - 1) (Esser et al. 2024, section 5.3.2; e^mu is alpha)."""
    return math.exp(mu) / (math.exp(mu) + 1.0 / sigmas - 1.0)


def linear_shift(sigmas: torch.Tensor, shift: float) -> torch.Tensor:
    """sigma -> shift sigma / (1 + (shift - 1) sigma) (Esser et al. 2024, section 5.3.2)."""
    return shift * sigmas / (1.0 + (shift - 1.0) * sigmas)


def stretch_to(sigmas: torch.Tensor, terminal: float) -> torch.Tensor:
    """Scale 1 - sigma (n,) so that the last sigma equals `terminal`."""
    z = 1.0 - sigmas
    return 1.0 - z * (1.0 - terminal) / z[-1]


def bell_weights(timesteps: torch.Tensor) -> torch.Tensor:
    """Loss weights w_i = (y_i - min y) n / sum(y - min y), y_i = exp(-2 ((t_i - 500) / 1000)^2).

    Args:
        timesteps: (n,) in [0, 1000].

    Returns:
        (n,) with mean 1.
    """
    # Highest in the middle of the schedule; the timestep farthest from it gets the weight 0.
    y = torch.exp(-2.0 * ((timesteps - NUM_TRAIN_TIMESTEPS / 2) / NUM_TRAIN_TIMESTEPS) ** 2)
    y = y - y.min()
    return y * (len(timesteps) / y.sum())


@dataclass(frozen=True)
class FlowPath:
    """The straight path between latents and noise: see `objective.noising.Noising`.

    Attributes:
        sigmas: (n,) float32, decreasing. The timesteps are 1000 sigma.
    """

    sigmas: torch.Tensor
    timesteps: torch.Tensor
    weights: torch.Tensor
    description: str

    def noised(self, x_0: torch.Tensor, epsilon: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        """x_t = (1 - sigma) x_0 + sigma epsilon."""
        sigma = at_index(self.sigmas, index, x_0)
        return (1.0 - sigma) * x_0 + sigma * epsilon

    def target(self, x_0: torch.Tensor, epsilon: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        """What the model predicts: the velocity epsilon - x_0, which is the same at every index."""
        return epsilon - x_0


def flow_path(sigmas: torch.Tensor, description: str) -> FlowPath:
    """The path of a schedule.

    Args:
        sigmas: float64 (n,), decreasing.
        description: see `Noising`.
    """
    # Converted to float32 only at the end, so that timesteps and weights are rounded once.
    timesteps = sigmas * NUM_TRAIN_TIMESTEPS
    return FlowPath(sigmas.float(), timesteps.float(), bell_weights(timesteps).float(), description)


def linear_sigmas() -> torch.Tensor:
    """1, 1 - 1/n, …, 1/n for the n = 1000 training timesteps: float64 (n,)."""
    return torch.linspace(1.0, 0.0, NUM_TRAIN_TIMESTEPS + 1, dtype=torch.float64)[:-1]
