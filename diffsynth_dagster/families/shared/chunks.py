"""Captions that are longer than CLIP reads, in chunks of 75 tokens (`caption_chunks`).

Each chunk is encoded by itself, with its own begin and end, and the embeddings stand one after another,
as AUTOMATIC1111's and ComfyUI's text encoding puts them. (kohya's `max_token_length` reads the same
chunks, but keeps one begin and one end for all, and fills every caption up with empty chunks.)
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
"""Tokens of a chunk, without its begin and end."""
PARAMETER = "caption_chunks"


def encode_chunks(
    loaded: Loaded,
    samples: Sequence[Sample],
    tokenizer: str,
    encoder: str,
    hidden: bool,
    chunks: int,
) -> tuple[Sequence[torch.Tensor], Any, Any]:
    """Prompts → for each its embeddings (77 n, width) of n chunks, as many as it needs and at most
    `chunks`; all outputs, a row for each chunk; and which rows are of first chunks.

    Args:
        tokenizer, encoder, hidden: see `encode_text`.
    """
    if chunks == 1:
        embeds, outputs = encode_text(loaded, samples, tokenizer, encoder, hidden)
        return list(embeds), outputs, slice(None)
    clip: Any = loaded[encoder]
    length = clip.config.max_position_embeddings
    rows = [chunk_rows(loaded[tokenizer], s["prompt"], length, chunks) for s in samples]
    counts = [len(own) for own in rows]
    ids = torch.tensor([row for own in rows for row in own], device=clip.device)
    outputs = clip(ids, output_hidden_states=hidden)
    states = outputs.hidden_states[-2] if hidden else outputs.last_hidden_state
    first = [sum(counts[:index]) for index in range(len(counts))]
    return [own.flatten(0, 1) for own in states.split(counts)], outputs, first


def chunk_rows(tokenizer: Any, prompt: str, length: int, chunks: int) -> list[list[int]]:
    """A prompt → its chunks, each of `length` tokens: begin, up to `length` - 2 of the prompt, end, and
    padding. An empty prompt has one."""
    size = length - 2
    ids = tokenizer(prompt, add_special_tokens=False, verbose=False).input_ids[: size * chunks]
    parts = [ids[at : at + size] for at in range(0, max(1, len(ids)), size)]
    begin, end, padding = (
        tokenizer.bos_token_id,
        tokenizer.eos_token_id,
        tokenizer.pad_token_id,
    )
    return [[begin, *part, end] + [padding] * (size - len(part)) for part in parts]


def of_one_length(conditions: Tensors, *names: str) -> list[torch.Tensor]:
    """Embeddings of the prompts of a batch as (B, L, width), of one length L.

    Those of fewer chunks are repeated until they are as long. For attention that changes nothing:
    every key stands there equally often, so that the weights of its copies add up to its own.
    """
    if f"{names[0]}_mask" not in conditions:
        return [conditions[name] for name in names]
    counts = {name: conditions[f"{name}_mask"].sum(dim=1).tolist() for name in names}
    length = lcm(*(n for own in counts.values() for n in own))
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
    """The family with captions in chunks, where the config asks for more than one.

    Args:
        outputs: the embeddings of captions; the stages that yield them take `chunks`.
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
