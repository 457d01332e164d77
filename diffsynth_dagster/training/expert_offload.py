"""Keeps only the active expert's frozen weights on the device; the others' are in CPU memory."""

from collections.abc import Sequence

import torch
from torch import nn


class OffloadedWeights:
    """The frozen weights of a module: kept in CPU memory, and copied to the device for use.

    Trained weights (a LoRA) stay on the device. Nothing is copied back: frozen weights do not
    change.

    Args:
        module: its frozen weights are moved to CPU memory.
        device: where the module computes.
    """

    def __init__(self, module: nn.Module, device: torch.device) -> None:
        self._device = device
        pinned = device.type == "cuda"  # only copies from pinned memory are asynchronous
        self._kept: list[tuple[nn.Parameter, torch.Tensor]] = []
        for parameter in module.parameters():
            if not parameter.requires_grad:
                held = parameter.data.to("cpu")
                self._kept.append((parameter, held.pin_memory() if pinned else held))
        self._on_device = True
        self.rest()

    def rest(self) -> None:
        """Free the weights' memory on the device, if they are there."""
        if self._on_device:
            for parameter, held in self._kept:
                # An empty tensor on the device, so that the module's device still reads as before.
                parameter.data = torch.empty(0, dtype=held.dtype, device=self._device)
        self._on_device = False

    def work(self) -> None:
        """Copy the weights to the device, unless they are there."""
        if not self._on_device:
            for parameter, held in self._kept:
                parameter.data = held.to(self._device, non_blocking=True)
        self._on_device = True


def keep_one_on_device(modules: Sequence[nn.Module], device: torch.device) -> None:
    """Keep only the last-called module's frozen weights on the device; before a first call, none.

    Calls are those of training steps and of samples.
    """
    # One after another: each gives up the device's memory before the next one is pinned.
    weights = [OffloadedWeights(module, device) for module in modules]

    def activate(chosen: OffloadedWeights) -> None:
        # The others first: there may be no room for two.
        for other in weights:
            if other is not chosen:
                other.rest()
        chosen.work()

    for module, module_weights in zip(modules, weights, strict=True):
        # As a default value, since a closure would see the last module's weights in every hook.
        module.register_forward_pre_hook(lambda *_, chosen=module_weights: activate(chosen))
