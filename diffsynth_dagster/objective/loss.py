"""Losses per sample instead of per batch: their mean does not depend on how samples are batched."""

import torch


def sample_losses(
    prediction: torch.Tensor,
    target: torch.Tensor,
    weight: torch.Tensor,
    known: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Weighted mean squared error of each sample.

    Args:
        prediction, target: (B, …).
        weight: (B,), the loss weight of each sample's timestep.
        known: (B, …) or broadcastable; 1 for elements that the model is given, which do not count.
        mask: (B, …) or broadcastable; how much each element counts in the mean, 0 or more. If no
            element of a sample counts, its loss is 0.

    Returns:
        (B,) float32.
    """
    error = (prediction.float() - target.float()) ** 2
    if known is None and mask is None:
        return error.flatten(1).mean(1) * weight
    counted = torch.ones_like(error) if known is None else (1.0 - known.float()).expand_as(error)
    # Avoids 0 / 0. Without a mask the sum of `counted` is 0 or at least 1; with one it may be any
    # small number, and must not be raised.
    least = 1.0
    if mask is not None:
        counted, least = counted * mask.float(), torch.finfo(torch.float32).tiny
    total = (error * counted).flatten(1).sum(1)
    return total / counted.flatten(1).sum(1).clamp(min=least) * weight
