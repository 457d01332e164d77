"""Muon for matrices and AdamW for all other parameters, as one optimizer.

Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon) orthogonalises the update of a
matrix. As its authors do, this leaves biases, gains, convolutions and embeddings to AdamW. Both
steps are torch's.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

_MUON = "uses_muon"


class MuonWithAdamW(torch.optim.Optimizer):
    """`torch.optim.Muon` and `torch.optim.AdamW` with one state and one list of groups.

    Args:
        parameters: parameters or groups of them. Each group is split into matrices and the rest.
        embeddings: matrices that AdamW updates.
        lr, weight_decay: of both. With the default `adjust_lr_fn`, the update of a matrix is as
            large as AdamW's (Liu et al. 2025, arXiv:2502.16982), so one learning rate suits both.
        momentum, nesterov, ns_steps, adjust_lr_fn: see `torch.optim.Muon`.
        betas, eps: see `torch.optim.AdamW`.
    """

    def __init__(
        self,
        parameters: Sequence[nn.Parameter] | Sequence[dict[str, Any]],
        embeddings: Iterable[torch.Tensor],
        lr: float,
        weight_decay: float,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_steps: int = 5,
        adjust_lr_fn: str = "match_rms_adamw",
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ) -> None:
        # By identity: `in` would compare the values of tensors.
        tables = {id(parameter) for parameter in embeddings}
        grouped = [p for p in parameters if isinstance(p, dict)]
        groups: list[dict[str, Any]] = grouped or [{"params": list(parameters)}]
        # Keys: whether Muon updates them.
        split: dict[bool, list[dict[str, Any]]] = {True: [], False: []}
        for group in groups:
            parts: dict[bool, list[nn.Parameter]] = {True: [], False: []}
            for parameter in group["params"]:
                parts[parameter.ndim == 2 and id(parameter) not in tables].append(parameter)
            for uses_muon, parameters in parts.items():
                if parameters:
                    split[uses_muon].append({**group, "params": parameters, _MUON: uses_muon})
        self._parts: list[tuple[bool, torch.optim.Optimizer]] = []
        if split[True]:
            muon = torch.optim.Muon(
                split[True],
                lr,
                weight_decay,
                momentum,
                nesterov,
                ns_steps=ns_steps,
                adjust_lr_fn=adjust_lr_fn,
            )
            self._parts.append((True, muon))
        if split[False]:
            adamw = torch.optim.AdamW(split[False], lr, betas, eps, weight_decay)
            self._parts.append((False, adamw))
        # The groups of this optimizer, so that a learning-rate schedule reaches both parts.
        whole = [group for _, part in self._parts for group in part.param_groups]
        super().__init__(whole, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: object = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Make one step of both, from the current gradients. `closure` must be None."""
        assert closure is None, "the gradients are there already"
        for uses_muon, part in self._parts:
            # Loading a state replaces the groups of this object: hand its parts the current ones.
            part.param_groups = [g for g in self.param_groups if g[_MUON] == uses_muon]
            # One state for both, so that it is saved and loaded as one.
            part.state = self.state
            part.step()
