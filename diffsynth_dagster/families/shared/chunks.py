"""Captions that are too long for CLIP, in chunks of 75 tokens (`caption_chunks`).

Each chunk is encoded separately, with its own begin and end token, and the embeddings are
concatenated, as in AUTOMATIC1111 and ComfyUI. (kohya's `max_token_length` uses the same chunks, but
keeps one begin and one end token for all, and pads every caption with empty chunks.)
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from math import lcm
from typing import Any, cast

import torch

from diffsynth_dagster.config.parameters import TrainingConfig
from diffsynth_dagster.families.contract import Family, Loaded, Sample, Stage, Tensors
from diffsynth_dagster.families.shared.clip import LIMIT, encode_text

SIZE = 75
"""Tokens of a chunk, without its begin and end tokens."""
PARAMETER = "caption_chunks"


def encode_chunks(
    loaded: Loaded,
    samples: Sequence[Sample],
    tokenizer: str,
    encoder: str,
    hidden: bool,
    chunks: int,
) -> tuple[Sequence[torch.Tensor], Any, Any]:
    """Encode prompts in chunks.

    Args:
        tokenizer, encoder, hidden: see `encode_text`.
        chunks: the most chunks of a prompt.

    Returns:
        The embeddings (77 n, width) of each prompt, where n is the number of chunks it needs; the
        encoder's outputs, with a row for each chunk; and the rows of the first chunks.
    """
    if chunks == 1:
        embeds, outputs = encode_text(loaded, samples, tokenizer, encoder, hidden)
        return list(embeds), outputs, slice(None)
    clip: Any = loaded[encoder]
    length = clip.config.max_position_embeddings
    # All chunks of all prompts form one batch. `counts` splits the results again.
    rows = [chunk_rows(loaded[tokenizer], s["prompt"], length, chunks) for s in samples]
    counts = [len(prompt_rows) for prompt_rows in rows]
    ids = torch.tensor([row for prompt_rows in rows for row in prompt_rows], device=clip.device)
    outputs = clip(ids, output_hidden_states=hidden)
    states = outputs.hidden_states[-2] if hidden else outputs.last_hidden_state
    first = [sum(counts[:index]) for index in range(len(counts))]
    return [parts.flatten(0, 1) for parts in states.split(counts)], outputs, first


def chunk_rows(tokenizer: Any, prompt: str, length: int, chunks: int) -> list[list[int]]:
    """Split a prompt into chunks of `length` tokens each: begin, up to `length` - 2 tokens of the
    prompt, end, and padding. An empty prompt has one chunk."""
    size = length - 2
    # `verbose=False`: the tokenizer would warn about every prompt that is longer than CLIP reads.
    ids = tokenizer(prompt, add_special_tokens=False, verbose=False).input_ids[: size * chunks]
    # `max`: an empty prompt is one chunk of no tokens.
    parts = [ids[at : at + size] for at in range(0, max(1, len(ids)), size)]
    begin, end, padding = (
        tokenizer.bos_token_id,
        tokenizer.eos_token_id,
        tokenizer.pad_token_id,
    )
    return [[begin, *part, end] + [padding] * (size - len(part)) for part in parts]


def of_one_length(conditions: Tensors, *names: str) -> list[torch.Tensor]:
    """The prompt embeddings of a batch as tensors (B, L, width) of one length L.

    Shorter embeddings are repeated up to L, the least common multiple of the lengths. This does not
    change the result of attention: every key occurs equally often, so the weights of its copies add
    up to its own weight. UNets take no attention mask for padding.
    """
    # There is no mask if the stage was not made ragged by `with_chunks`.
    if f"{names[0]}_mask" not in conditions:
        return [conditions[name] for name in names]
    counts = {name: conditions[f"{name}_mask"].sum(dim=1).tolist() for name in names}
    length = lcm(*(n for lengths in counts.values() for n in lengths))
    return [
        torch.stack(
            [
                row[:n].repeat(length // n, 1)
                for row, n in zip(conditions[name], counts[name], strict=True)
            ]
        )
        for name in names
    ]


def with_chunks(family: Family, config: TrainingConfig, outputs: Sequence[str]) -> Family:
    """The family with captions in chunks, if the config asks for more than one.

    Args:
        outputs: the outputs with caption embeddings. The stages that yield them take `chunks`.
    """
    if config.caption_chunks == 1:
        return family
    stages = [
        _in_chunks(stage, config.caption_chunks, outputs)
        if any(output.name in outputs for output in stage.yields)
        else stage
        for stage in family.stages
    ]
    return replace(family, stages=tuple(stages))


def _in_chunks(stage: Stage, chunks: int, outputs: Sequence[str]) -> Stage:
    """A prompt stage that encodes captions in chunks."""
    advice, run = (
        f"shorten them, or raise {PARAMETER}",
        cast("Callable[..., list[Tensors]]", stage.run),
    )
    return replace(
        stage,
        run=partial(run, chunks=chunks),
        yields=tuple(replace(o, ragged=o.name in outputs) for o in stage.yields),
        settings=((PARAMETER, chunks),),
        limit=stage.limit and replace(LIMIT, most=SIZE * chunks + 2, advice=advice),
    )
