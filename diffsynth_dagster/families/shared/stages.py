"""Stages that several families declare: prompt embeddings and image latents."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from diffsynth_dagster.data.columns import CAPTION, Input
from diffsynth_dagster.families.contract import Loaded, Output, Sample, Stage, Tensors
from diffsynth_dagster.families.limits import TokenLimit
from diffsynth_dagster.families.shared.latents import stacked

PROMPT = Input(CAPTION, "text", caption=True)

Encode = Callable[[Any, torch.Tensor], torch.Tensor]
"""(VAE, images (B, 3, H, W) in [-1, 1]) → latents (B, C, h, w)."""


def prompt_stage(
    run: Callable[[Loaded, Sequence[Sample]], list[Tensors]],
    name: str = "prompt",
    uses: tuple[str, ...] = ("tokenizer", "text_encoder"),
    output: str = "prompt_embeds",
    ragged: bool = False,
    limit: TokenLimit | None = None,
) -> Stage:
    """A stage that encodes the column `prompt` to one condition.

    Args:
        run: see `Stage`.
        uses: names of the tokenizer and the encoder.
        ragged: whether the length of the output differs between prompts.
        limit: see `Stage`.
    """
    yields = (Output(output, "condition", ragged),)
    return Stage(name, (PROMPT,), uses, yields, run, limit=limit)


def image_stage(encode: Encode) -> Stage:
    """A stage that encodes the column `image` to the target `image`."""
    run = partial(encode_column, encode=encode, column="image", name="image")
    return Stage("image", (Input("image", "image"),), ("vae",), (Output("image", "target"),), run)


def encode_column(
    loaded: Loaded, samples: Sequence[Sample], encode: Encode, column: str, name: str
) -> list[Tensors]:
    """Images (3, H, W) of a column → latents (C, h, w), as the output `name`."""
    return [{name: latents} for latents in encode(loaded["vae"], stacked(samples, column))]
