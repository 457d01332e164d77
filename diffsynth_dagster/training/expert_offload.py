"""Denoisers that take turns on the device: the frozen weights of the others wait in CPU memory."""

from collections.abc import Sequence

import torch
from torch import nn


class IdleWeights:
    """The frozen weights of a module, held in CPU memory and lent to the device.

    Weights that are trained (a LoRA) stay on the device. Nothing is ever copied back: frozen
    weights do not change.

    Args:
        module: its frozen weights wait in CPU memory from now on.
        device: where the module computes.
    """

    def __init__(self, module: nn.Module, device: torch.device) -> None:
        self._device = device
        pinned = device.type == "cuda"  # so that copies need not wait
        self._kept: list[tuple[nn.Parameter, torch.Tensor]] = []
        for parameter in module.parameters():
            if not parameter.requires_grad:
                held = parameter.data.to("cpu")
                self._kept.append((parameter, held.pin_memory() if pinned else held))
        self._at_work = True
        self.rest()

    def rest(self) -> None:
        """Free the device's memory, unless it is free."""
        if self._at_work:
            for parameter, held in self._kept:
                parameter.data = torch.empty(0, dtype=held.dtype, device=self._device)
        self._at_work = False

    def work(self) -> None:
        """Copy the weights to the device, unless they are there."""
        if not self._at_work:
            for parameter, held in self._kept:
                parameter.data = held.to(self._device, non_blocking=True)
        self._at_work = True


def take_turns(modules: Sequence[nn.Module], device: torch.device) -> None:
    """Keep the frozen weights of one of some modules at most on a device: of the one that was
    called last, in a training step or while samples are made. Before that, of none."""
    # One after another, so that only one of them is ever whole on the device.
    weights = [IdleWeights(module, device) for module in modules]

    def put_to_work(chosen: IdleWeights) -> None:
        for other in weights:
            if other is not chosen:
                other.rest()
        chosen.work()

    for module, own in zip(modules, weights, strict=True):
        module.register_forward_pre_hook(lambda *_, own=own: put_to_work(own))
