"""How much a LoRA changes the weights of a layer: norms of s B A, without ever making that product.

By the cyclic property of the trace, ‖B A‖² = tr((Bᵀ B)(A Aᵀ)): two products of the size of the rank.
"""

import torch

from diffsynth_dagster.families.lora import Lora


def change_norms(lora: Lora) -> dict[str, float]:
    """Layer → the Frobenius norm of s B A."""
    return {layer: _norm(*_factors(lora, layer)) for layer in lora.down}


def difference(one: Lora, other: Lora) -> float:
    """The largest norm of the difference of two LoRAs' changes of a layer, relative to the change itself.
    A layer that one of them lacks is one that it does not change.
    """
    largest = 0.0
    for layer in {**one.down, **other.down}:
        parts = [_factors(lora, layer) for lora in (one, other) if layer in lora.down]
        sizes = [_norm(a, b) for a, b in parts]
        if len(parts) == 2:
            (a, b), (c, d) = parts
            apart = _norm(torch.cat([a, c]), torch.cat([b, -d], dim=1))
        else:
            apart = sizes[0]
        if apart:
            largest = max(largest, apart / max(sizes))
    return largest


def _factors(lora: Lora, layer: str) -> tuple[torch.Tensor, torch.Tensor]:
    """A (rank, inputs) and s B (outputs, rank) of a layer in float64."""
    a, b = lora.down[layer].double().flatten(1), lora.up[layer].double().flatten(1)
    return a, b * lora.scale[layer]


def _norm(a: torch.Tensor, b: torch.Tensor) -> float:
    """The Frobenius norm of B A."""
    return float(((b.T @ b) * (a @ a.T)).sum().clamp(min=0).sqrt())
