"""Denoising diffusion with a discrete schedule (Ho et al. 2020, arXiv:2006.11239).

Notation: x_0 are clean latents, epsilon ~ N(0, 1), alpha-bar is the cumulative product of 1 - beta,
and x_t = sqrt(alpha-bar) x_0 + sqrt(1 - alpha-bar) epsilon. The signal-to-noise ratio (SNR) of a
timestep is alpha-bar / (1 - alpha-bar).
"""

from dataclasses import dataclass
from typing import Literal

import torch

from diffsynth_dagster.objective.noising import at_index

NUM_TRAIN_TIMESTEPS = 1000
Prediction = Literal["epsilon", "v_prediction", "sample"]
"""What a model predicts, by the names of diffusers: the noise, v (Salimans and Ho 2022,
arXiv:2202.00512, appendix D), or the clean latents."""
BetaSchedule = Literal["scaled_linear", "linear"]


def alpha_bars(schedule: BetaSchedule, first: float, last: float) -> torch.Tensor:
    """alpha-bar of the timesteps 0, 1, …, 999: float64 (1000,), decreasing.

    Args:
        schedule: "linear": beta is linear in the timestep; "scaled_linear": its square root is
            (Rombach et al. 2022, arXiv:2112.10752).
        first, last: beta at the first and the last timestep.
    """
    power = 0.5 if schedule == "scaled_linear" else 1.0
    # In float64: a product of 1000 factors near 1 loses digits in float32.
    roots = torch.linspace(first**power, last**power, NUM_TRAIN_TIMESTEPS, dtype=torch.float64)
    return torch.cumprod(1.0 - roots ** (1.0 / power), 0)


def with_zero_terminal_snr(alpha_bar: torch.Tensor) -> torch.Tensor:
    """Shift and scale sqrt(alpha-bar) so that the last timestep is pure noise and the first one is
    unchanged (Lin et al. 2023, arXiv:2305.08891, algorithm 1)."""
    root = alpha_bar.sqrt()
    return ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2


def min_snr_weights(
    alpha_bar: torch.Tensor, prediction: Prediction, gamma: float | None
) -> torch.Tensor:
    """Min-SNR loss weights (n,) (Hang et al. 2023, arXiv:2303.09556, section 3.4).

    The weight of a prediction of the clean latents is min(snr, gamma). It is divided by snr for a
    prediction of epsilon, and by snr + 1 for v. All weights are 1 if gamma is None.
    """
    if gamma is None:
        return torch.ones_like(alpha_bar)
    snr = alpha_bar / (1.0 - alpha_bar)
    # An error of x_0 of size 1 is an error of epsilon of size sqrt(snr), and of v of sqrt(snr + 1).
    divisor = {"epsilon": snr, "v_prediction": snr + 1.0, "sample": torch.ones_like(snr)}
    return snr.clamp(max=gamma) / divisor[prediction]


@dataclass(frozen=True)
class DDPMPath:
    """The variance-preserving path between latents and noise: see `objective.noising.Noising`.

    Attributes:
        signal, noise: (n,) float32, sqrt(alpha-bar) and sqrt(1 - alpha-bar).
        zero_terminal_snr: whether index 0 is pure noise.
    """

    signal: torch.Tensor
    noise: torch.Tensor
    timesteps: torch.Tensor
    weights: torch.Tensor
    prediction: Prediction
    zero_terminal_snr: bool
    description: str

    @property
    def sigmas(self) -> None:
        """None: sigmas belong to the straight path of flow matching."""
        return None

    def noised(self, x_0: torch.Tensor, epsilon: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        """x_t = sqrt(alpha-bar) x_0 + sqrt(1 - alpha-bar) epsilon."""
        return at_index(self.signal, index, x_0) * x_0 + at_index(self.noise, index, x_0) * epsilon

    def target(self, x_0: torch.Tensor, epsilon: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        """What the model predicts: epsilon, v = sqrt(alpha-bar) epsilon - sqrt(1 - alpha-bar) x_0,
        or x_0."""
        if self.prediction == "v_prediction":
            signal, noise = at_index(self.signal, index, x_0), at_index(self.noise, index, x_0)
            return signal * epsilon - noise * x_0
        return epsilon if self.prediction == "epsilon" else x_0


def ddpm_path(
    schedule: BetaSchedule,
    first: float,
    last: float,
    prediction: Prediction,
    zero_terminal_snr: bool = False,
    min_snr_gamma: float | None = None,
) -> DDPMPath:
    """The path of a schedule of betas.

    Args:
        schedule, first, last: see `alpha_bars`.
        zero_terminal_snr: see `with_zero_terminal_snr`.
        min_snr_gamma: see `min_snr_weights`.
    """
    # x_t is the noise itself at the last timestep, so predicting it would teach nothing there.
    assert not (zero_terminal_snr and prediction == "epsilon"), "the noise says nothing there"
    alpha_bar = alpha_bars(schedule, first, last)
    if zero_terminal_snr:
        alpha_bar = with_zero_terminal_snr(alpha_bar)
    alpha_bar = alpha_bar.flip(0)  # index 0 has the most noise: see `Noising`
    words = f"DDPM, beta {first:g} to {last:g} ({schedule}), predicts {prediction}"
    words += ", zero terminal SNR" if zero_terminal_snr else ""
    words += "" if min_snr_gamma is None else f", min-SNR weight with gamma {min_snr_gamma:g}"
    return DDPMPath(
        alpha_bar.sqrt().float(),
        (1.0 - alpha_bar).sqrt().float(),
        torch.arange(NUM_TRAIN_TIMESTEPS, dtype=torch.float32).flip(0),
        min_snr_weights(alpha_bar, prediction, min_snr_gamma).float(),
        prediction,
        zero_terminal_snr,
        words,
    )
