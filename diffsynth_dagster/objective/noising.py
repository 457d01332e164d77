"""The contract of a noising path: how noise is added to latents, and what the model predicts."""

from typing import Protocol

import torch

from diffsynth_dagster.objective.devices import to_device


class Noising(Protocol):
    """A noising path with a discrete schedule of n timesteps. Index 0 has the most noise.

    The argument `index`, integers (B,), gives the place of each sample of a batch in the schedule.
    Samples may be on any device; the index and the schedule are on the CPU.
    """

    @property
    def timesteps(self) -> torch.Tensor:
        """(n,) float32 in [0, 1000], decreasing; passed to the denoiser."""
        ...

    @property
    def sigmas(self) -> torch.Tensor | None:
        """(n,) float32, decreasing, if x_t = (1 - sigma) x_0 + sigma epsilon; None otherwise."""
        ...

    @property
    def weights(self) -> torch.Tensor:
        """(n,) float32: the loss weight of each timestep."""
        ...

    @property
    def description(self) -> str:
        """The path in words, with every number that it depends on. It is part of identities."""
        ...

    def noised(self, x_0: torch.Tensor, epsilon: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        """Add noise: clean latents (B, …) and noise (B, …) → x_t (B, …)."""
        ...

    def target(self, x_0: torch.Tensor, epsilon: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        """What the model predicts at x_t (B, …)."""
        ...


def at_index(values: torch.Tensor, index: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """The values (n,) of a schedule at an index (B,), in a shape (B, 1, …) that broadcasts with
    `like` (B, …), on its device."""
    return to_device(values[index], like.device).view(-1, *(1,) * (like.ndim - 1))
