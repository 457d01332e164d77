"""The average of the trained weights over the steps, which is saved and evaluated in their place.

The average is an exponential moving average with a power-function profile: Karras et al. 2024,
"Analyzing and Improving the Training Dynamics of Diffusion Models", arXiv:2312.02696, section 3.1.
After step T it is the sum of w_t θ_t over all steps t, where θ_t are the weights after step t and

    w_t = (t^(γ+1) - (t-1)^(γ+1)) / T^(γ+1).

So the averaged span grows with the training, and early steps are soon forgotten. γ follows from
σ_rel, the standard deviation of the profile relative to the length of the training.
"""

from collections.abc import Generator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from diffsynth_dagster.config.parameters import TrainingConfig
from diffsynth_dagster.errors import ParameterError
from diffsynth_dagster.training.optimizer import averages_by_itself, needs_whole_tensors
from diffsynth_dagster.training.parallel import Parallel

if TYPE_CHECKING:
    from diffsynth_dagster.training.setup import TrainingState


def gamma_of(sigma_rel: float) -> float:
    """γ of the profile whose relative standard deviation is σ_rel.

    σ_rel² = (γ+1) / ((γ+2)² (γ+3)), of which the largest root is taken: equations 123 and 126 of
    arXiv:2312.02696.

    Args:
        sigma_rel: more than 0 and less than 1/√12, at which γ is 0.
    """
    # Multiplied out: γ³ + 7γ² + (16 - 1/σ²)γ + 12 - 1/σ² = 0.
    inverse = sigma_rel**-2
    roots: Any = np.roots([1.0, 7.0, 16.0 - inverse, 12.0 - inverse])
    return float(max(root.real for root in roots))


class Average:
    """No average: the weights are saved and evaluated as they are.

    Attributes:
        weights: name → average, for the state of the training; empty if there is none, or if the
            optimizer's state holds it.
    """

    def __init__(self) -> None:
        self.weights: dict[str, torch.Tensor] = {}

    def update(self, step: int) -> None:
        """Update the average with the weights after a step, counted from 1."""

    def restore(self, weights: Mapping[str, torch.Tensor]) -> None:
        """Restore `weights` from a state."""

    @contextmanager
    def in_place(self) -> Generator[None]:
        """While entered, the parameters hold their averages. Afterwards they are the same bits as
        before."""
        yield


class PowerAverage(Average):
    """The average of the weights over the steps so far; before the first step, the weights
    themselves.

    Args:
        trained: name → float32 parameter. The averages are float32 too, on the same device.
        sigma_rel: see `gamma_of`; usually 0.05 to 0.15.
    """

    def __init__(self, trained: Mapping[str, nn.Parameter], sigma_rel: float) -> None:
        super().__init__()
        self._trained = dict(trained)
        self._power = gamma_of(sigma_rel) + 1
        self.weights = {name: p.detach().clone() for name, p in self._trained.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """See `Average`. Equation 127 of arXiv:2312.02696."""
        # 0 at step 1, so the initial weights do not count.
        beta = (1 - 1 / step) ** self._power
        averages: list[torch.Tensor] = [*self.weights.values()]
        weights: list[torch.Tensor] = [*self._trained.values()]
        # One kernel for all tensors. average ← average + (1 - β)(weights - average).
        torch._foreach_lerp_(averages, weights, 1 - beta)  # pyright: ignore[reportPrivateUsage]

    @torch.no_grad()
    def restore(self, weights: Mapping[str, torch.Tensor]) -> None:
        """See `Average`."""
        for name, average in self.weights.items():
            average.copy_(weights[name])

    @contextmanager
    def in_place(self) -> Generator[None]:
        """See `Average`. Takes no memory: parameters and averages are swapped."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def _swap(self) -> None:
        for parameter, average in zip(self._trained.values(), self.weights.values(), strict=True):
            # Both keep their identity: the optimizer and the prepared module refer to them.
            parameter.data, average.data = average.data, parameter.data


class AverageOfOptimizer(Average):
    """The average that a schedule-free optimizer keeps.

    Args:
        trained: name → parameter.
        optimizer: has `eval` and `train`, and is in training mode.
    """

    def __init__(self, trained: Mapping[str, nn.Parameter], optimizer: Any) -> None:
        super().__init__()
        self._trained = dict(trained)
        self._optimizer = optimizer

    @contextmanager
    def in_place(self) -> Generator[None]:
        """See `Average`. Keeps a copy of the weights meanwhile, since the optimizer restores them
        only up to rounding."""
        # It computes the averaged weights in place, by a linear map and its inverse.
        before = [parameter.detach().clone() for parameter in self._trained.values()]
        self._optimizer.eval()
        try:
            yield
        finally:
            self._optimizer.train()
            with torch.no_grad():
                for parameter, weights in zip(self._trained.values(), before, strict=True):
                    parameter.copy_(weights)


def refuse_average(
    config: TrainingConfig, parallel: Parallel, optimizer: torch.optim.Optimizer
) -> None:
    """Refuse an average that cannot be kept, and an optimizer that DeepSpeed cannot use.

    Args:
        optimizer: as `make_optimizer` made it.

    Raises:
        ParameterError: DeepSpeed splits the weights, and the optimizer or the average needs them
            whole; or the optimizer keeps an average, and the config asks for another one.
    """
    in_pieces = not parallel.updates_whole_tensors
    if in_pieces and needs_whole_tensors(config, optimizer):
        raise ParameterError(
            "DeepSpeed cuts tensors into pieces for the optimizer, and this one needs them whole",
            where=f"optimizer = {config.optimizer}, customized_optimizer = {config.customized_optimizer}",
            do="choose another one, or train without DeepSpeed",
        )
    if averages_by_itself(optimizer) and config.ema_sigma_rel is not None:
        raise ParameterError(
            "the optimizer keeps an average by itself",
            where=f"ema_sigma_rel = {config.ema_sigma_rel}",
            do="leave it out, or choose another optimizer",
        )
    if in_pieces and config.ema_sigma_rel is not None:
        raise ParameterError(
            "DeepSpeed keeps the weights that it trains in parts, of which no average is kept",
            where=f"ema_sigma_rel = {config.ema_sigma_rel}",
            do="leave it out, or train without DeepSpeed",
        )


def make_average(
    config: TrainingConfig, trained: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer
) -> Average:
    """The average that the optimizer keeps by itself, or that the config asks for.

    Args:
        trained: name → parameter of the prepared module.
        optimizer: as `make_optimizer` made it.
    """
    if averages_by_itself(optimizer):
        return AverageOfOptimizer(trained, optimizer)
    if config.ema_sigma_rel is None:
        return Average()
    return PowerAverage(trained, config.ema_sigma_rel)


def evaluated_weights(training: "TrainingState") -> AbstractContextManager[None]:
    """Entered to save or evaluate: the trained weights of this process hold their average
    meanwhile, if there is one. Afterwards they are the same bits as before.

    Must not be nested, and no step or state may be made inside. Not collective.
    """
    return training.average.in_place()
