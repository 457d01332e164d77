"""Choose the caption of a visit of a sample, as a function of (seed, sample, visit)."""

import torch

from diffsynth_dagster.objective.noise import generator


def caption_index(seed: int, sample: str, visit: int, count: int, dropout: float) -> int:
    """Index of the caption that a visit of a sample is trained with, drawn uniformly.

    Args:
        count: number of captions of the sample, without the empty one.
        dropout: probability of the empty caption, whose index is `count`, as classifier-free
            guidance needs it (Ho and Salimans 2022, arXiv:2207.12598, algorithm 1).
    """
    source = generator(seed, "caption", sample, visit)
    # No number is drawn without dropout: it would change the caption that is drawn after it.
    if dropout > 0.0 and float(torch.rand((), generator=source)) < dropout:
        return count
    return int(torch.randint(count, (), generator=source))
