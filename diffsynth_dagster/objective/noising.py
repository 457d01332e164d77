"""What a noising path is: how latents are noised, and what the model then predicts."""

from typing import Protocol

import torch

from diffsynth_dagster.objective.devices import sent


class Noising(Protocol):
    """A noising path with a discrete schedule of n timesteps. Index 0 has the most noise.

    An index (B,) of integers says which timestep each sample of a batch is at. Samples may lie on
    any device, the index and the schedule on the CPU.
    """

    @property
    def timesteps(self) -> torch.Tensor:
        """(n,) float32 in [0, 1000], decreasing; passed to the denoiser."""
        ...

    @property
    def sigmas(self) -> torch.Tensor | None:
        """(n,) float32, decreasing, where x_t = (1 - sigma) x_0 + sigma epsilon; None for others."""
        ...

    @property
    def weights(self) -> torch.Tensor:
        """(n,) float32, what the loss at each timestep is multiplied by."""
        ...

    @property
    def description(self) -> str:
        """The path in words, with every number that it depends on."""
        ...

    def noised(self, x_0: torch.Tensor, epsilon: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        """Clean latents (B, …) and noise (B, …) → x_t (B, …)."""
        ...

    def target(self, x_0: torch.Tensor, epsilon: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        """What the model predicts at x_t (B, …)."""
        ...


def at_index(values: torch.Tensor, index: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """The values (n,) of a schedule at an index (B,), to be multiplied with `like` (B, …): on its
    device, in the shape (B, 1, …)."""
    return sent(values[index], like.device).view(-1, *(1,) * (like.ndim - 1))
