"""Prompts → tokens → embeddings."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from diffsynth_dagster.families.contract import Sample


def padded_tokens(tokenizer: Any, samples: Sequence[Sample], length: int) -> torch.Tensor:
    """The tokens of the prompts of samples (B, length), truncated or padded.

    For models that attend to the padding.
    """
    prompts = [sample["prompt"] for sample in samples]
    return tokenizer(
        prompts, padding="max_length", max_length=length, truncation=True, return_tensors="pt"
    ).input_ids


def tokens(tokenizer: Any, prompts: Sequence[str], length: int) -> list[list[int]]:
    """The tokens of each prompt, truncated to `length`, not padded."""
    return [tokenizer(text, truncation=True, max_length=length).input_ids for text in prompts]


def encode_by_length(
    rows: Sequence[Sequence[int]],
    encode: Callable[[torch.Tensor], torch.Tensor],
    device: torch.device,
) -> list[torch.Tensor]:
    """Encode tokenized prompts without padding. Prompts of equal length share a forward pass.

    So the embeddings of a prompt do not depend on the other prompts of the batch.

    Args:
        rows: the tokens of each prompt.
        encode: tokens (b, L) → hidden states (b, L, hidden).
        device: the encoder's device.

    Returns:
        The hidden states (L, hidden) of each prompt, in the order of `rows`.
    """
    states: dict[int, torch.Tensor] = {}
    for length in sorted({len(row) for row in rows}):
        members = [index for index, row in enumerate(rows) if len(row) == length]
        ids = torch.tensor([rows[index] for index in members], device=device)
        states |= dict(zip(members, encode(ids), strict=True))
    return [states[index] for index in range(len(rows))]
