"""Images and clips made with the model as it stands, and functions that measure it by them."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from diffsynth_dagster.cache.manifest import Manifest
from diffsynth_dagster.cache.store import Store
from diffsynth_dagster.config.parameters import TrainingConfig
from diffsynth_dagster.data.geometry import clip_rule
from diffsynth_dagster.families.contract import Clip, SampleRequest, Tensors
from diffsynth_dagster.objective.noise import generator
from diffsynth_dagster.training.batches import collate
from diffsynth_dagster.training.step import weight_dtype
from diffsynth_dagster.weights.models import Models

SAMPLE_BATCH = 50
STRIP_FRAMES = 8
"""Frames of a sampled video that its picture shows."""

Generate = Callable[[Sequence[str], int], list[Image.Image]]
"""(prompts, seed) → one image for each prompt, of a clip the strip of its frames. Equal prompts get
different noise."""


@dataclass(frozen=True)
class Evaluation:
    """What a function of `customized_evaluation` returns.

    Attributes:
        metrics: name → number.
        pictures: name → image to look at.
    """

    metrics: dict[str, float]
    pictures: dict[str, Image.Image]


class Sampler:
    """Makes images and clips with the components as they stand.

    Prompts named in the recipe are read from the store; others are encoded when they are asked for.

    Args:
        autocast: entered around what uses trained modules, as in a training step: their weights are
            float32, and the others may not be.
    """

    def __init__(
        self,
        config: TrainingConfig,
        manifest: Manifest,
        models: Models,
        autocast: Callable[[], AbstractContextManager[Any]],
    ) -> None:
        self._autocast = autocast
        self._config = config
        self._manifest = manifest
        self._models = models
        self._store = Store(Path(manifest.store))
        self._family = models.found.family
        geometry = self._family.geometry
        clip = clip_rule(config.num_frames, config.frame_rate, geometry, self._family.name)
        self._frames = 1 if clip is None else clip.num_frames
        self._frame_rate = None if clip is None else clip.frame_rate

    def __call__(
        self, live: Mapping[str, Any], prompts: Sequence[str], seed: int
    ) -> Iterator[Clip]:
        """One clip for each prompt, with the components in `live` in place of the loaded ones.

        They come as they are made, so that not all of them are in memory at once.
        """
        negative = self._config.sample_cfg_scale > 1
        encoded = self._encode(live, [*dict.fromkeys(prompts), *([""] if negative else [])])
        denoisers = [denoiser.component for denoiser in self._family.denoisers]
        others = [name for name in (*self._family.decoder, *denoisers) if name not in live]
        loaded = {**self._models.get(others), **live}
        dtype = weight_dtype(next(live[name] for name in denoisers if name in live))
        for start in range(0, len(prompts), SAMPLE_BATCH):
            part = prompts[start : start + SAMPLE_BATCH]
            request = SampleRequest(
                conditions=self._stack([encoded[prompt] for prompt in part], dtype),
                negative=self._stack([encoded[""]] * len(part), dtype) if negative else None,
                height=self._config.height or self._family.geometry.sample_size[1],
                width=self._config.width or self._family.geometry.sample_size[0],
                num_frames=self._frames,
                frame_rate=self._frame_rate,
                num_inference_steps=self._config.sample_num_inference_steps,
                cfg_scale=self._config.sample_cfg_scale,
                generators=[generator(seed, "image", start + i) for i in range(len(part))],
                path=self._models.found.path,
            )
            with torch.no_grad(), self._autocast():
                clips = self._family.sample(loaded, request)
            yield from clips

    def _stack(self, samples: list[Tensors], dtype: torch.dtype) -> Tensors:
        outputs = [output for stage in self._family.text_stages for output in stage.yields]
        stacked = collate(outputs, samples)
        return {
            name: t.to(self._models.device, dtype if t.is_floating_point() else None)
            for name, t in stacked.items()
        }

    def _encode(self, live: Mapping[str, Any], prompts: Sequence[str]) -> dict[str, Tensors]:
        """Prompt → outputs of the text stages: from the store where it has them."""
        encoded: dict[str, Tensors] = {prompt: {} for prompt in prompts}
        for stage in self._family.text_stages:
            fresh: list[str] = []
            for prompt in prompts:
                key = self._manifest.prompts.get(prompt, {}).get(stage.name)
                if key is None:
                    fresh.append(prompt)
                else:
                    encoded[prompt] |= self._store.read(key)
            if not fresh:
                continue
            needed = [name for name in stage.uses if name not in live]
            loaded = {**self._models.get(needed), **live}
            is_live = len(needed) < len(stage.uses)
            with torch.no_grad(), self._autocast() if is_live else nullcontext():
                results = stage.run(loaded, [{"prompt": p, **encoded[p]} for p in fresh])
            for prompt, result in zip(fresh, results, strict=True):
                encoded[prompt] |= {name: tensor.cpu() for name, tensor in result.items()}
            self._models.free(needed)
        return encoded


def strip(frames: Sequence[Image.Image], most: int = STRIP_FRAMES) -> Image.Image:
    """Frames of a video side by side: the first, the last, and evenly between."""
    count = min(len(frames), most)
    places = [round(i * (len(frames) - 1) / max(1, count - 1)) for i in range(count)]
    return grid([frames[place] for place in places], columns=count, gap=0)


def grid(images: Sequence[Image.Image], columns: int, gap: int = 4) -> Image.Image:
    """Images of one size side by side, row by row, on white."""
    width, height = images[0].size
    rows = -(-len(images) // columns)
    size = (columns * (width + gap) - gap, rows * (height + gap) - gap)
    sheet = Image.new("RGB", size, "white")
    for index, image in enumerate(images):
        row, column = divmod(index, columns)
        sheet.paste(image, (column * (width + gap), row * (height + gap)))
    return sheet
