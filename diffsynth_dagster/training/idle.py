"""Frozen weights of a denoiser that wait in CPU memory while another denoiser is at work."""

import torch
from torch import nn


class IdleWeights:
    """Holds the frozen weights of a module in CPU memory, and lends them to the device.

    Weights that are trained (a LoRA) stay on the device. Nothing is ever copied back: frozen
    weights do not change.

    Args:
        module: its frozen weights rest from now on.
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
        """Free the device's memory."""
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
