"""Latents → sequences of tokens, one for each patch of 2x2 latents, and back."""

from collections.abc import Iterable

import torch

PATCH = 2
Grid = tuple[int, int]
"""Rows and columns of a picture's tokens."""


def grid_of(latents: torch.Tensor) -> Grid:
    """The token grid of latents (…, H, W)."""
    height, width = latents.shape[-2:]
    return height // PATCH, width // PATCH


def pack(latents: torch.Tensor) -> torch.Tensor:
    """Latents (B, C, H, W) → tokens of 2x2 patches (B, H W / 4, 4 C)."""
    b, c, h, w = latents.shape
    # (B, C, rows, 2, columns, 2) → (B, rows, columns, C, 2, 2): a token is C x 2 x 2 flattened.
    patches = latents.view(b, c, h // PATCH, PATCH, w // PATCH, PATCH)
    return patches.permute(0, 2, 4, 1, 3, 5).reshape(b, h * w // PATCH**2, c * PATCH**2)


def unpack(tokens: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Tokens (B, H W / 4, 4 C) → latents (B, C, H, W). H and W are `height` and `width`."""
    b, _, c = tokens.shape
    patches = tokens.view(b, height // PATCH, width // PATCH, c // PATCH**2, PATCH, PATCH)
    return patches.permute(0, 3, 1, 4, 2, 5).reshape(b, c // PATCH**2, height, width)


def pack_several(pictures: Iterable[torch.Tensor]) -> tuple[torch.Tensor, list[Grid]]:
    """Latents (B, C, H, W) of several pictures, H and W differing → the tokens of all pictures in
    order (B, L, 4 C), and the grid of each picture."""
    tokens: list[torch.Tensor] = []
    grids: list[Grid] = []
    for latents in pictures:
        tokens.append(pack(latents))
        grids.append(grid_of(latents))
    return torch.cat(tokens, dim=1), grids
