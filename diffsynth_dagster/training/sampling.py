"""Makes images and clips with the current weights; what evaluation functions are given and return.

A sample is made in the way the model is trained: with the same `denoise`, the same conditions and
the same given parts of a target. It goes from noise to data by the published sampler.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from diffsynth_dagster.cache.manifest import Manifest, SampleRow
from diffsynth_dagster.cache.store import Store
from diffsynth_dagster.config.parameters import TrainingConfig
from diffsynth_dagster.data.columns import Input
from diffsynth_dagster.data.geometry import clip_rule
from diffsynth_dagster.data.samples import load_files, parse_value
from diffsynth_dagster.errors import Stopped
from diffsynth_dagster.families.contract import Clip, Family, Loaded, SampleRequest, Stage, Tensors
from diffsynth_dagster.families.sampling_types import guidance_of
from diffsynth_dagster.objective.noise import generator
from diffsynth_dagster.training.batches import collate
from diffsynth_dagster.training.step import weight_dtype
from diffsynth_dagster.weights.models import Models

SAMPLE_BATCH = 50
"""Images that are made at once. Clips are made one by one."""
STRIP_FRAMES = 8
"""Frames of a video in its strip."""

Generate = Callable[[Sequence[str], int], list[Image.Image]]
"""(prompts, seed) → one image for each prompt; for a clip, the strip of its frames. Equal prompts
get different noise."""


@dataclass(frozen=True)
class Evaluation:
    """What a function of `customized_evaluation` returns.

    Attributes:
        metrics: name → number.
        pictures: name → image to look at.
    """

    metrics: dict[str, float]
    pictures: dict[str, Image.Image]


def make_clips(
    family: Family,
    loaded: Loaded,
    request: SampleRequest,
    stop_asked: Callable[[], bool] = lambda: False,
) -> list[Clip]:
    """A clip for each sample of a request.

    Args:
        loaded: the denoisers, what else `denoise` uses, and the components of the family's
            `decoder`.
        stop_asked: says whether to stop; called at each step.

    Raises:
        Stopped: `stop_asked` said so.
    """
    sampling = family.sampling
    device = next(iter(request.conditions.values())).device
    # Drawn on the CPU, so that samples of a seed are alike on all devices.
    noise = {
        name: torch.stack([torch.randn(shape, generator=g) for g in request.generators]).to(device)
        for name, shape in sampling.shapes(loaded, request).items()
    }
    solver = sampling.solver(request, noise)
    count = len(request.generators)
    constants = {n: torch.full((count,), v, device=device) for n, v in sampling.constants.items()}
    # With guidance, two predictions in each step: with the conditions, and without a prompt.
    handed = [{**request.conditions, **constants}]
    if request.negative is not None:
        # Without a negative prompt, some families use something else than the empty prompt.
        unprompted = (lambda given: given) if request.negative_prompt else sampling.unprompted
        handed.append({**unprompted(request.negative), **constants})
    x = solver.start(noise)
    for index, t in enumerate(solver.timesteps):
        if stop_asked():
            raise Stopped
        x_t = _with_given(solver.seen(x, index), request)
        timesteps = t.float().expand(count).to(device)
        now = float(timesteps[0])
        # The expert whose range of timesteps this is.
        at_work = (d.component for d in family.denoisers if d.low <= now < d.high)
        name = next(at_work, family.denoiser)
        predictions = [_predict(family, name, loaded, given, x_t, timesteps) for given in handed]
        prediction = predictions[0]
        if len(predictions) > 1:
            scale = request.cfg_scales.get(name, request.cfg_scale)
            # Experts may have scales of their own.
            prediction = sampling.guide(*predictions, scale)
        x = solver.step(prediction, x, index)
    return sampling.decode(loaded, request, _with_given(x, request))


def _with_given(x: Tensors, request: SampleRequest) -> Tensors:
    """The latents, with clean values in the parts that are given."""
    given, known = request.given, request.known
    return {
        n: torch.where(known[n].bool(), given[n].float(), latents) if n in known else latents
        for n, latents in x.items()
    }


def _predict(
    family: Family,
    denoiser: str,
    loaded: Loaded,
    conditions: Tensors,
    x_t: Tensors,
    t: torch.Tensor,
) -> Tensors:
    """The float32 prediction of a denoiser at t (B,), which is the same for all samples."""
    model = loaded[denoiser]
    dtype = weight_dtype(model)
    prediction = family.denoise(
        model,
        loaded,
        {n: c.to(dtype) if c.is_floating_point() else c for n, c in conditions.items()},
        {name: noisy.to(dtype) for name, noisy in x_t.items()},
        t,
    )
    return {name: tensor.float() for name, tensor in prediction.items()}


@dataclass(frozen=True)
class _Item:
    """A sample to make.

    Attributes:
        inputs: column → text, or files as JSON, for the stages that have no key.
        keys: stage → key of its outputs in the store.
        width, height: in pixels.
        frames: 1 for an image.
    """

    inputs: Mapping[str, str]
    keys: Mapping[str, str]
    width: int
    height: int
    frames: int


class Sampler:
    """Makes images and clips with the current weights.

    The encoded prompts of the recipe are read from the store; other prompts are encoded when
    needed.

    Args:
        autocast: entered around what uses trained modules, as in a training step: their weights are
            float32, while frozen ones may be of another type.
        stop_asked: see `make_clips`. All methods that yield clips may raise `Stopped`.
    """

    def __init__(
        self,
        config: TrainingConfig,
        manifest: Manifest,
        models: Models,
        autocast: Callable[[], AbstractContextManager[Any]],
        stop_asked: Callable[[], bool] = lambda: False,
    ) -> None:
        self._stop_asked = stop_asked
        self._autocast = autocast
        self._config = config
        self._manifest = manifest
        self._models = models
        self._store = Store(Path(manifest.store))
        self._family = family = models.resolved.family
        self._stages = family.sample_stages
        self._outputs = {o.name: o for stage in self._stages for o in stage.yields}
        clip = clip_rule(config.num_frames, config.frame_rate, family.geometry, family.name)
        self._frames = 1 if clip is None else clip.num_frames
        self._frame_rate = None if clip is None else clip.frame_rate
        self._guidance = guidance_of(config, family.sampling)

    def named(self, live: Mapping[str, Any], seed: int) -> Iterator[Clip]:
        """Yield a clip for each prompt, or row of a table, that `sample_prompts` names.

        Args:
            live: component name → module in training; the others are loaded.
        """
        if self._config.sample_table is None:
            yield from self(live, self._config.sample_texts, seed)
            return
        items = [self._row(row) for row in self._manifest.sample_rows]
        negative = [self._row(row) for row in self._manifest.unprompted_rows]
        yield from self._make(live, items, negative if self._guidance.is_on else None, seed)

    @property
    def prompts(self) -> list[str]:
        """The prompts of the samples that `named` makes, in order."""
        if self._config.sample_table is None:
            return [*self._config.sample_texts]
        return [row["inputs"].get("prompt", "") for row in self._manifest.sample_rows]

    def __call__(
        self, live: Mapping[str, Any], prompts: Sequence[str], seed: int
    ) -> Iterator[Clip]:
        """Yield a clip for each prompt. The components in `live` replace the loaded ones.

        Clips are yielded as they are made, so that not all are in memory at once.
        """
        items = [self._prompt(prompt) for prompt in prompts]
        unprompted = self._prompt(self._guidance.negative_prompt)
        negative = [unprompted] * len(items) if self._guidance.is_on else None
        yield from self._make(live, items, negative, seed)

    def _prompt(self, prompt: str) -> _Item:
        width, height = self._size(0, 0)
        keys = self._manifest.prompts.get(prompt, {})
        return _Item({"prompt": prompt}, keys, width, height, self._frames)

    def _row(self, row: SampleRow) -> _Item:
        width, height = self._size(row["width"], row["height"])
        return _Item(row["inputs"], row["keys"], width, height, row["frames"])

    def _size(self, width: int, height: int) -> tuple[int, int]:
        """Width and height of a sample in pixels: as given, else of the config, else of the
        family."""
        default = self._family.geometry.sample_size
        return (
            width or self._config.width or default[0],
            height or self._config.height or default[1],
        )

    def _make(
        self,
        live: Mapping[str, Any],
        items: Sequence[_Item],
        negative: Sequence[_Item] | None,
        seed: int,
    ) -> Iterator[Clip]:
        """Yield a clip for each item. Its noise depends on the seed and its position."""
        # Encoded first, and together: the text encoder is freed before the denoisers are loaded.
        encoded = self._encode(live, [*items, *(negative or [])])
        denoisers = [denoiser.component for denoiser in self._family.denoisers]
        # `denoise_uses` may name components that this model list does not have.
        beside = [n for n in self._family.denoise_uses if n in self._models.resolved.components]
        names = (*self._family.decoder, *denoisers, *beside)
        loaded = {**self._models.get([name for name in names if name not in live]), **live}
        for part in self._batches(items, encoded):
            first = items[part[0]]
            outputs = self._stack([encoded[i] for i in part])
            # The outputs of the negative items come after those of the items.
            unprompted = [encoded[len(items) + i] for i in part] if negative is not None else None
            request = SampleRequest(
                conditions=self._handed(outputs),
                negative=None if unprompted is None else self._handed(self._stack(unprompted)),
                height=first.height,
                width=first.width,
                num_frames=first.frames,
                frame_rate=self._frame_rate,
                num_inference_steps=self._config.sample_num_inference_steps,
                cfg_scale=self._guidance.scale,
                cfg_scales=self._guidance.scales,
                negative_prompt=self._guidance.negative_prompt,
                generators=[generator(seed, "image", i) for i in part],
                noising=self._models.resolved.noising,
                known={
                    of: tensor
                    for name, tensor in outputs.items()
                    if (of := self._of_known(name)) is not None
                },
                given={n: t for n, t in outputs.items() if self._role(n) == "target"},
            )
            with torch.no_grad(), self._autocast():
                clips = make_clips(self._family, loaded, request, self._stop_asked)
            yield from clips
        # A frozen expert that the steps do not use is not needed until the next samples.
        self._models.free([name for name in denoisers if name not in live])

    def _batches(self, items: Sequence[_Item], encoded: Sequence[Tensors]) -> Iterator[list[int]]:
        """Positions of items that are made at once: neighbours with outputs of equal shapes."""

        def shape_of(place: int) -> Any:
            # Ragged outputs, such as prompts, are padded: their lengths may differ.
            item, ragged = items[place], [n for n, o in self._outputs.items() if o.ragged]
            shapes = [(n, () if n in ragged else t.shape) for n, t in encoded[place].items()]
            return item.width, item.height, item.frames, shapes

        for _, places in groupby(range(len(items)), shape_of):
            listed = list(places)
            # Images are small; the latents of two clips may not fit.
            size = SAMPLE_BATCH if items[listed[0]].frames == 1 else 1
            yield from (listed[at : at + size] for at in range(0, len(listed), size))

    def _stack(self, samples: list[Tensors]) -> Tensors:
        stacked = collate([o for o in self._outputs.values() if o.name in samples[0]], samples)
        return {name: tensor.to(self._models.device) for name, tensor in stacked.items()}

    def _role(self, name: str) -> str:
        return self._outputs[name].role if name in self._outputs else "condition"

    def _of_known(self, name: str) -> str | None:
        return self._outputs[name].of if self._role(name) == "known" else None

    def _handed(self, outputs: Tensors) -> Tensors:
        """The outputs that are passed to `denoise`, as in a training step."""
        return {n: t for n, t in outputs.items() if self._role(n) in ("condition", "known")}

    def _encode(self, live: Mapping[str, Any], items: Sequence[_Item]) -> list[Tensors]:
        """The outputs of the stages for each item. They are read from the store if it has them."""
        encoded: list[Tensors] = [{} for _ in items]
        for stage in self._stages:
            fresh: list[int] = []
            for place, item in enumerate(items):
                key = item.keys.get(stage.name)
                if key is None:
                    fresh.append(place)
                else:
                    encoded[place] |= stage.from_store(self._store.read(key))
            if fresh:
                results = self._run(stage, live, [(items[i], encoded[i]) for i in fresh])
                for place, made in zip(fresh, results, strict=True):
                    # In CPU memory, since all prompts are encoded before the first is used.
                    encoded[place] |= {name: tensor.cpu() for name, tensor in made.items()}
        return encoded

    def _run(
        self, stage: Stage, live: Mapping[str, Any], items: Sequence[tuple[_Item, Tensors]]
    ) -> list[Tensors]:
        """The outputs of a stage for items, each given with the outputs of the earlier stages."""
        needs = {o.name for name in stage.needs for o in self._family.stage(name).yields}
        samples = [
            {i.column: _value(item, i) for i in stage.reads}
            | {name: tensor for name, tensor in before.items() if name in needs}
            for item, before in items
        ]
        needed = [name for name in stage.uses if name not in live]
        loaded = {**self._models.get(needed), **live}
        is_live = len(needed) < len(stage.uses)
        # A batch must have files of equal sizes, which are unknown here: one at a time then.
        size = 1 if any(i.is_file for i in stage.reads) else max(1, len(samples))
        results: list[Tensors] = []
        with torch.no_grad(), self._autocast() if is_live else nullcontext():
            for at in range(0, len(samples), size):
                results += stage.run(loaded, samples[at : at + size])
        self._models.free(needed)
        return results


def _value(item: _Item, column: Input) -> Any:
    """The value of an item in a column that a stage reads."""
    if column.kind == "sizes":
        # Original size, crop (top, left) and target size: nothing is resized or cropped.
        return item.height, item.width, 0, 0, item.height, item.width
    text = item.inputs[column.column]
    return load_files(json.loads(text), column, 0) if column.is_file else parse_value(text, column)


def strip(frames: Sequence[Image.Image], most: int = STRIP_FRAMES) -> Image.Image:
    """Up to `most` frames of a video side by side, evenly spaced from the first to the last."""
    count = min(len(frames), most)
    places = [round(i * (len(frames) - 1) / max(1, count - 1)) for i in range(count)]
    return grid([frames[place] for place in places], columns=count, gap=0)


def grid(images: Sequence[Image.Image], columns: int, gap: int = 4) -> Image.Image:
    """Images row by row on white, at the places of `grid_boxes`. `gap` is in pixels."""
    boxes = grid_boxes([image.size for image in images], columns, gap)
    width, height = (max(image.size[side] for image in images) for side in (0, 1))
    # Of whole cells, also where the images of the last row or column are smaller.
    rows = -(-len(images) // columns)
    size = (columns * (width + gap) - gap, rows * (height + gap) - gap)
    sheet = Image.new("RGB", size, "white")
    for image, (left, top, *_) in zip(images, boxes, strict=True):
        sheet.paste(image, (left, top))
    return sheet


def grid_boxes(sizes: Sequence[tuple[int, int]], columns: int, gap: int = 4) -> list[list[int]]:
    """Left, top, right and bottom of images of these sizes in a `grid`: its cells have the size of
    the largest."""
    width, height = (max(size[side] for size in sizes) + gap for side in (0, 1))
    places = [(n % columns * width, n // columns * height) for n in range(len(sizes))]
    return [[x, y, x + w, y + h] for (x, y), (w, h) in zip(places, sizes, strict=True)]
