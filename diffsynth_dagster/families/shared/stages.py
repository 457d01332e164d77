"""Stages that several families declare: a prompt's embeddings, an image's latents."""

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
    """The stage of a text encoder: `prompt` → one condition.

    Args:
        run: see `Stage`.
        uses: the tokenizer and the encoder.
        ragged: whether the length of the output differs between prompts.
        limit: see `Stage`.
    """
    yields = (Output(output, "condition", ragged),)
    return Stage(name, (PROMPT,), uses, yields, run, limit=limit)


def image_stage(encode: Encode) -> Stage:
    """The stage of the VAE: the column `image` → the target `image`."""
    run = partial(encode_column, encode=encode, column="image", name="image")
    return Stage("image", (Input("image", "image"),), ("vae",), (Output("image", "target"),), run)


def encode_column(
    loaded: Loaded, samples: Sequence[Sample], encode: Encode, column: str, name: str
) -> list[Tensors]:
    """Images (3, H, W) of a column → the output `name`, their latents (C, h, w)."""
    return [{name: latents} for latents in encode(loaded["vae"], stacked(samples, column))]
