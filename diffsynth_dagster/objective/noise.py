"""Draw noise and timesteps as functions of (seed, sample, visit) alone.

No global generator is used. So a sample gets the same noise whatever the batch size, the number of
processes or the device, and however often the run was stopped and resumed.
"""

import hashlib

import torch


def generator(seed: int, *words: str | int) -> torch.Generator:
    """A CPU generator whose state depends only on the seed and the words."""
    # The unit separator keeps ("a", "bc") and ("ab", "c") apart.
    text = "\x1f".join(str(word) for word in (seed, *words))
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    # `manual_seed` takes signed 64-bit integers.
    return torch.Generator().manual_seed(int.from_bytes(digest, "big") & (2**63 - 1))


def timestep_index(seed: int, sample_id: str, visit: int, low: int, high: int) -> int:
    """An index drawn uniformly in [low, high)."""
    source = generator(seed, "timestep", sample_id, visit)
    return int(torch.randint(low, high, (), generator=source))


def noise(
    seed: int, sample_id: str, visit: int, target: str, shape: tuple[int, ...]
) -> torch.Tensor:
    """Standard normal noise of this shape, float32 on the CPU, for one target of one sample."""
    # On the CPU, since CUDA's generator gives other numbers.
    source = generator(seed, "noise", target, sample_id, visit)
    return torch.randn(shape, generator=source, dtype=torch.float32)
