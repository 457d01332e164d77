"""Losses of samples, not of batches: their mean does not depend on how samples are batched."""

import torch


def sample_losses(
    prediction: torch.Tensor,
    target: torch.Tensor,
    weight: torch.Tensor,
    known: torch.Tensor | None = None,
) -> torch.Tensor:
    """Weighted mean squared error of each sample.

    Args:
        prediction, target: (B, …).
        weight: (B,), the weight of each sample's timestep.
        known: (B, …) or broadcastable, 1 where the element is given and does not count.

    Returns:
        (B,) float32.
    """
    error = (prediction.float() - target.float()) ** 2
    if known is None:
        return error.flatten(1).mean(1) * weight
    counted = (1.0 - known.float()).expand_as(error)
    total = (error * counted).flatten(1).sum(1)
    return total / counted.flatten(1).sum(1).clamp(min=1.0) * weight
