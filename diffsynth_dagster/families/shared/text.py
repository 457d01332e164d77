"""Prompts → tokens → embeddings."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from diffsynth_dagster.families.contract import Sample


def padded_tokens(tokenizer: Any, samples: Sequence[Sample], length: int) -> torch.Tensor:
    """The prompts of samples as tokens (B, length), cut or padded, for models that attend to the
    padding."""
    prompts = [sample["prompt"] for sample in samples]
    return tokenizer(
        prompts, padding="max_length", max_length=length, truncation=True, return_tensors="pt"
    ).input_ids


def tokens(tokenizer: Any, prompts: Sequence[str], length: int) -> list[list[int]]:
    """The tokens of each prompt, cut at `length` and not padded."""
    return [tokenizer(text, truncation=True, max_length=length).input_ids for text in prompts]


def encode_by_length(
    rows: Sequence[Sequence[int]],
    encode: Callable[[torch.Tensor], torch.Tensor],
    device: torch.device,
) -> list[torch.Tensor]:
    """Encode tokenized prompts; those of equal length share a forward pass, so none is padded.

    Args:
        rows: the tokens of each prompt.
        encode: tokens (b, L) → hidden states (b, L, hidden).
        device: of the tokens.

    Returns:
        For each prompt its hidden states (L, hidden), in the order of `rows`.
    """
    states: dict[int, torch.Tensor] = {}
    for length in sorted({len(row) for row in rows}):
        members = [index for index, row in enumerate(rows) if len(row) == length]
        ids = torch.tensor([rows[index] for index in members], device=device)
        states |= dict(zip(members, encode(ids), strict=True))
    return [states[index] for index in range(len(rows))]
