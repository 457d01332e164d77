"""Makes images and clips with the current weights; what evaluation functions are given and return.

A sample is made in the way the model is trained: its row goes through the same stages, and the same
`denoise` is given the same conditions and the same given parts of a target. It goes from noise to data by the published sampler.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import torch
from PIL import Image

from diffsynth_dagster.cache.resolve import Sample
from diffsynth_dagster.cache.row_sets import reduced_family
from diffsynth_dagster.cache.sampled_rows import SampledRows
from diffsynth_dagster.config.parameters import TrainingConfig
from diffsynth_dagster.data.geometry import clip_rule
from diffsynth_dagster.errors import Stopped
from diffsynth_dagster.families.contract import Clip, Family, Loaded, SampleRequest, Tensors
from diffsynth_dagster.families.sampling_types import guidance_of
from diffsynth_dagster.objective.noise import generator
from diffsynth_dagster.training.batches import StepDataset
from diffsynth_dagster.training.stage_outputs import StageOutputs
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


class Sampler:
    """Makes images and clips of encoded rows, with the current weights.

    Args:
        autocast: entered around what uses trained modules, as in a training step: their weights are
            float32, while frozen ones may be of another type.
        stop_asked: see `make_clips`.
    """

    def __init__(
        self,
        config: TrainingConfig,
        models: Models,
        autocast: Callable[[], AbstractContextManager[Any]],
        stop_asked: Callable[[], bool] = lambda: False,
    ) -> None:
        self._config = config
        self._models = models
        self._autocast = autocast
        self._stop_asked = stop_asked
        self._family = family = models.resolved.family
        self._reduced = replace(models.resolved, family=reduced_family(family))
        self._stage_outputs = StageOutputs(self._reduced)
        clip = clip_rule(config.num_frames, config.frame_rate, family.geometry, family.name)
        self._frame_rate = None if clip is None else clip.frame_rate
        self._guidance = guidance_of(config, family.sampling)

    def make(
        self,
        live: Mapping[str, Any],
        rows: SampledRows,
        seed: int,
        rank: int = 0,
        world: int = 1,
    ) -> Iterator[tuple[int, Clip]]:
        """Yield the number of a sample and its clip, for the samples that this process makes.

        Clips are yielded as they are made, so that not all are in memory at once. A sample's noise
        depends on the seed and its number.

        Args:
            live: component name → module in training; the others are loaded.
            rank: number of this process, of `world` processes that share the samples. All of them
                call the model equally often, since a prepared model may wait for all of them.

        Raises:
            Stopped: the run was asked to stop.
        """
        data = StepDataset(self._config, self._reduced, rows.samples, 0, 1)
        denoisers = [denoiser.component for denoiser in self._family.denoisers]
        # `denoise_uses` may name components that this model list does not have.
        beside = [n for n in self._family.denoise_uses if n in self._models.resolved.components]
        names = (*self._stage_outputs.uses, *self._family.decoder, *denoisers, *beside)
        loaded = {**self._models.get([name for name in names if name not in live]), **live}
        batches = _batches(rows, world)
        for turn in range(0, len(batches), world):
            # A process that has no batch left makes the last one again, and leaves it.
            numbers = batches[min(turn + rank, len(batches) - 1)]
            request = self._request(data, rows, numbers, seed, loaded)
            with torch.no_grad(), self._autocast():
                clips = make_clips(self._family, loaded, request, self._stop_asked)
            if turn + rank < len(batches):
                yield from zip(numbers, clips, strict=True)
        # A frozen expert that the steps do not use is not needed until the next samples.
        self._models.free([name for name in denoisers if name not in live])

    def _request(
        self,
        data: StepDataset,
        rows: SampledRows,
        numbers: Sequence[int],
        seed: int,
        loaded: Loaded,
    ) -> SampleRequest:
        """What is asked of `make_clips` for some samples of one shape."""
        width, height, frames = rows.sizes[numbers[0]]
        outputs = self._outputs(data, [rows.at(n) for n in numbers], loaded)
        given, known, conditions = self._stage_outputs.by_role(outputs)
        negative = None
        if self._guidance.is_on:
            unprompted = self._outputs(data, [rows.unprompted(n) for n in numbers], loaded)
            negative = self._stage_outputs.by_role(unprompted)[2]
        return SampleRequest(
            conditions=conditions,
            negative=negative,
            height=height,
            width=width,
            num_frames=frames,
            frame_rate=self._frame_rate,
            num_inference_steps=self._config.sample_num_inference_steps,
            cfg_scale=self._guidance.scale,
            cfg_scales=self._guidance.scales,
            negative_prompt=self._guidance.negative_prompt,
            generators=[generator(seed, "image", n) for n in numbers],
            noising=self._models.resolved.noising,
            known=known,
            given=given,
        )

    def _outputs(self, data: StepDataset, samples: Sequence[Sample], loaded: Loaded) -> Tensors:
        """The stacked outputs of all stages, for rows of one shape."""
        unused = [0] * len(samples)  # no visit, no timestep
        batch = data.read(samples, unused, unused, 0, self._family.denoiser, 1.0)
        device = self._models.device
        with torch.no_grad(), self._autocast():
            return self._stage_outputs.of(batch.to(device), loaded, device)


def _batches(rows: SampledRows, world: int) -> list[list[int]]:
    """Numbers of samples that are made at once: neighbours of one shape."""
    batches: list[list[int]] = []
    for _, together in groupby(range(len(rows)), rows.bucket):
        numbers = list(together)
        # Images are small, and shared among the processes; the latents of two clips may not fit.
        is_image = rows.sizes[numbers[0]][2] == 1
        size = min(SAMPLE_BATCH, -(-len(numbers) // world)) if is_image else 1
        batches += [numbers[at : at + size] for at in range(0, len(numbers), size)]
    return batches


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
