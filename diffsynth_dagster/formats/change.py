"""How much a LoRA changes the weights of a layer: norms of s B A, without computing that product.

By the cyclic property of the trace, ‖B A‖² = tr((Bᵀ B)(A Aᵀ)): two (rank, rank) matrices instead of
one of the size of the layer's weight.
"""

import torch

from diffsynth_dagster.families.lora import Lora


def change_norms(lora: Lora) -> dict[str, float]:
    """Layer → the Frobenius norm of s B A."""
    return {layer: _norm(*_factors(lora, layer)) for layer in lora.down}


def difference(one: Lora, other: Lora) -> float:
    """How much two LoRAs differ: the largest relative difference of their changes of a layer.

    It is the norm of the difference, divided by the larger norm of the two changes. A layer that
    one of them lacks counts as unchanged by it.
    """
    largest = 0.0
    for layer in {**one.down, **other.down}:
        parts = [_factors(lora, layer) for lora in (one, other) if layer in lora.down]
        sizes = [_norm(a, b) for a, b in parts]
        if len(parts) == 2:
            # B A - D C is the LoRA with the factors [A; C] and [B, -D].
            (a, b), (c, d) = parts
            distance = _norm(torch.cat([a, c]), torch.cat([b, -d], dim=1))
        else:
            distance = sizes[0]
        if distance:
            largest = max(largest, distance / max(sizes))
    return largest


def _factors(lora: Lora, layer: str) -> tuple[torch.Tensor, torch.Tensor]:
    """A (rank, inputs) and s B (outputs, rank) of a layer, in float64."""
    # Kernels of convolutions have more dimensions. Flattened, they are matrices, with equal norms.
    a, b = lora.down[layer].double().flatten(1), lora.up[layer].double().flatten(1)
    return a, b * lora.scale[layer]


def _norm(a: torch.Tensor, b: torch.Tensor) -> float:
    """The Frobenius norm of B A."""
    # Rounding may make the trace of a difference of nearly equal LoRAs slightly negative.
    return float(((b.T @ b) * (a @ a.T)).sum().clamp(min=0).sqrt())
