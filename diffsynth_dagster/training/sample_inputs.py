"""The pictures that a sample is made from, to be shown beside it."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from diffsynth_dagster.cache.sampled_rows import SampledRows
from diffsynth_dagster.data.columns import Input
from diffsynth_dagster.data.samples import load_files
from diffsynth_dagster.errors import MetadataError, OutOfMemory
from diffsynth_dagster.training.sampling import strip

GAP = 2
"""Pixels between a sample and its inputs."""


def input_pictures(rows: SampledRows, inputs: Sequence[Input], number: int) -> list[Image.Image]:
    """The pictures and clips that the row of a sample names, as they are read for it; a clip is a
    strip of frames.

    Files that are missing or have changed since they were encoded are left out: the second half of
    split training need not have them.
    """
    found: list[Image.Image] = []
    for item in (i for i in inputs if i.is_file and i.kind != "audio"):
        try:
            loaded = load_files(rows.files(number, item), item, number + 1)
        except (MetadataError, OutOfMemory):
            continue  # a picture to look at is no reason to end a training
        listed: Sequence[Any] = loaded if isinstance(loaded, list) else [loaded]
        found += [strip([*_frames(value)]) for value in listed if value is not None]
    return found


def _frames(loaded: Any) -> Iterator[Image.Image]:
    """The frames of a picture or clip as `load_files` returns it."""
    if isinstance(loaded, Image.Image):
        yield loaded.convert("RGB")
        return
    frames: torch.Tensor = loaded if loaded.ndim == 4 else loaded[:, None]
    for frame in frames.unbind(1):
        pixels = ((frame.permute(1, 2, 0).float() + 1) * 127.5).round().clamp(0, 255)
        yield Image.fromarray(pixels.numpy().astype(np.uint8))


def beside(sample: Image.Image, inputs: Sequence[Image.Image], is_clip: bool) -> Image.Image:
    """A sample to the right of its inputs at the same height; the strip of a clip below them, at
    the same width."""
    if not inputs:
        return sample
    parts = [*(_fitted(picture, sample, is_clip) for picture in inputs), sample]
    # Along one side they follow one another; the sample is last, at the far end.
    along = 1 if is_clip else 0
    size = [max(part.size[side] for part in parts) for side in (0, 1)]
    size[along] = sum(part.size[along] + GAP for part in parts) - GAP
    sheet = Image.new("RGB", (size[0], size[1]), "white")
    place = [0, 0]
    for part in parts:
        sheet.paste(part, (place[0], place[1]))
        place[along] += part.size[along] + GAP
    return sheet


def _fitted(picture: Image.Image, sample: Image.Image, is_clip: bool) -> Image.Image:
    """A picture scaled to the height of a sample; above the strip of a clip, no wider than it."""
    scale = sample.height / picture.height
    if is_clip:
        scale = min(scale, sample.width / picture.width)
    size = max(1, round(picture.width * scale)), max(1, round(picture.height * scale))
    return picture if size == picture.size else picture.resize(size)
