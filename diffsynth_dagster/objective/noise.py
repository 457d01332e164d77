"""Noise and timesteps as a function of (seed, sample, visit) and of nothing else.

A sample gets the same noise whatever the batch size, the number of processes, the device, or how
often the run was stopped: nothing is drawn from a global generator.
"""

import hashlib

import torch


def generator(seed: int, *words: str | int) -> torch.Generator:
    """A CPU generator whose state depends on the seed and the words alone."""
    text = "\x1f".join(str(word) for word in (seed, *words))
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big") & (2**63 - 1))


def timestep_index(seed: int, sample_id: str, visit: int, low: int, high: int) -> int:
    """An index drawn uniformly in [low, high)."""
    source = generator(seed, "timestep", sample_id, visit)
    return int(torch.randint(low, high, (), generator=source))


def noise(
    seed: int, sample_id: str, visit: int, target: str, shape: tuple[int, ...]
) -> torch.Tensor:
    """Standard normal noise of this shape, float32 on the CPU, for one target of one sample."""
    source = generator(seed, "noise", target, sample_id, visit)
    return torch.randn(shape, generator=source, dtype=torch.float32)
