"""Trades computing for memory: activations are computed again in the backward pass, or wait in CPU memory."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn

from diffsynth_dagster.config.parameters import TrainingConfig
from diffsynth_dagster.errors import ParameterError


def checkpoint_gradients(module: nn.Module, required: bool = True) -> None:
    """Switch gradient checkpointing on, where the architecture has it.

    Raises:
        ParameterError: it has none, and it is required.
    """
    for name in ("enable_gradient_checkpointing", "gradient_checkpointing_enable"):
        switch = getattr(module, name, None)
        if callable(switch) and getattr(module, "_supports_gradient_checkpointing", True):
            switch()
            return
    if not required:
        return
    raise ParameterError(
        f"{type(module).__name__} has no gradient checkpointing",
        where="use_gradient_checkpointing",
        do="leave it out",
    )


def saved_tensors(config: TrainingConfig, device: torch.device) -> AbstractContextManager[object]:
    """Entered around a forward pass: keeps what its backward pass needs in CPU memory, where the config
    asks for that.

    Args:
        device: of the training.
    """
    if not config.use_gradient_checkpointing_offload:
        return nullcontext()
    return torch.autograd.graph.save_on_cpu(pin_memory=device.type == "cuda")
