"""The caption that a visit of a sample is told, as a function of (seed, sample, visit)."""

import torch

from diffsynth_dagster.objective.noise import generator


def caption_index(seed: int, sample: str, visit: int, count: int, dropout: float) -> int:
    """Which of its captions a visit of a sample is told: each as likely as the others.

    Args:
        count: how many captions it has, without the empty one.
        dropout: how often it is told the empty one instead, whose index is `count` (Ho and Salimans
            2022, arXiv:2207.12598, algorithm 1).
    """
    source = generator(seed, "caption", sample, visit)
    if dropout > 0.0 and float(torch.rand((), generator=source)) < dropout:
        return count
    return int(torch.randint(count, (), generator=source))
