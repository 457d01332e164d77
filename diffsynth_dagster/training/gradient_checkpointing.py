"""Saves memory for activations: recompute them in the backward pass, or keep them in CPU memory."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn

from diffsynth_dagster.config.parameters import TrainingConfig
from diffsynth_dagster.errors import ParameterError


def checkpoint_gradients(module: nn.Module, required: bool = True) -> None:
    """Switch gradient checkpointing on, if the architecture supports it.

    Raises:
        ParameterError: it is required, and the architecture does not support it.
    """
    # The names of diffusers and of transformers.
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
    """Entered around a forward pass: keeps what the backward pass needs in CPU memory, if the
    config asks for it.

    Args:
        device: of the training.
    """
    if not config.use_gradient_checkpointing_offload:
        return nullcontext()
    # Pinned memory lets copies run beside the computation.
    return torch.autograd.graph.save_on_cpu(pin_memory=device.type == "cuda")
