"""Pictures and clips inside the report, as data URIs: it needs no other file."""

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from diffsynth_dagster.data.media.image import IMAGE_ERRORS, read_image
from diffsynth_dagster.report.words import data_uri
from diffsynth_dagster.run.record import PICTURES, RunRecord, ShownSample

BUDGET = 8_000_000
"""Bytes of the samples in a report, pictures and clips together."""
MOST_STEPS = 9
"""Steps whose samples are shown; of more, the first, the last, and evenly spaced ones."""
_MOST_SIDE, _LEAST_SIDE, _MOST_EVALUATION = 768, 64, 1000
"""Sides of squares with as many pixels as a sample, at most and at least, and as a picture of the
evaluation."""
_SMALL = 160
"""Pictures with no side above this are drawn enlarged, pixel by pixel, and stored without loss."""
_QUALITY = 82
UNREADABLE = (*IMAGE_ERRORS, MemoryError)
"""What reading a picture may raise. The report leaves such a picture out."""


@dataclass(frozen=True)
class Picture:
    """A picture inside the report.

    Attributes:
        uri: its content.
        small: whether it is to be enlarged pixel by pixel.
    """

    uri: str
    width: int
    height: int
    small: bool


@dataclass(frozen=True)
class Shot:
    """A sample after a step.

    Attributes:
        picture: None if the file is missing or cannot be read.
        clip: the content of its video as a data URI; None if it has none, or it is too large.
        clip_file: path of its video from the run folder; None if it has none.
    """

    step: int
    picture: Picture | None
    clip: str | None = None
    clip_file: str | None = None


@dataclass(frozen=True)
class Sample:
    """A sample through the training.

    Attributes:
        prompt: None if `shots` show the samples of all prompts together.
    """

    prompt: str | None
    shots: Sequence[Shot]


@dataclass(frozen=True)
class Samples:
    """The samples of a training.

    Attributes:
        steps: those that are shown.
        left_out: those that are not.
        prompts: of all samples, where the record does not say where each lies.
    """

    rows: Sequence[Sample] = field(default_factory=list[Sample])
    steps: Sequence[int] = field(default_factory=list[int])
    left_out: Sequence[int] = field(default_factory=list[int])
    prompts: Sequence[str] = field(default_factory=list[str])

    @property
    def wide(self) -> bool:
        """Whether a sample is much wider than high: a strip of frames, or inputs beside it."""
        shots = [shot.picture for row in self.rows for shot in row.shots]
        return any(p is not None and p.width > 2.2 * p.height for p in shots)


def embedded(image: Image.Image, most: int) -> Picture:
    """A picture as a data URI, scaled down to at most as many pixels as a square with sides of
    `most`."""
    image = image.convert("RGB")
    small = max(image.size) <= _SMALL
    scale = most / math.sqrt(image.width * image.height)
    if scale < 1:
        size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
        image = image.resize(size, Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    # Small ones are enlarged: what a lossy format did to them would be seen.
    image.save(buffer, "WEBP", lossless=small, quality=_QUALITY, method=2)
    return Picture(data_uri("image/webp", buffer.getvalue()), *image.size, small)


def read_samples(folder: Path, record: RunRecord) -> Samples:
    """The samples that a training wrote, as many as fit; missing files are left out."""
    files = {step: folder / PICTURES / name for step, name in record.sample_pictures.items()}
    steps = chosen(list(files), MOST_STEPS)
    if not steps:
        return Samples()
    shown = record.shown or [None]
    clips = _clips(folder, record, steps) if record.shown else {}
    left = BUDGET - sum(len(clip) for clip in clips.values())
    taken = _taken(files, record.shown, steps, left)
    rows: list[Sample] = []
    for number, sample in enumerate(shown):
        shots: list[Shot] = []
        for step in steps:
            name = f"step-{step}-{number}"
            file = record.clips.get(name) if record.shown else None
            path = None if file is None else f"{PICTURES}/{file}"
            shots.append(Shot(step, taken[step][number], clips.get(name), path))
        rows.append(Sample(None if sample is None else sample["prompt"], shots))
    left_out = [step for step in files if step not in steps]
    return Samples(rows, steps, left_out, [] if record.shown else _prompts(record))


def evaluation_pictures(folder: Path, record: RunRecord) -> list[tuple[str, Picture]]:
    """Name and picture of what `customized_evaluation` drew; missing ones are left out."""
    names = [name for name in record.pictures if name.startswith(("before-", "after-"))]
    found: list[tuple[str, Picture]] = []
    for name in names:
        image = _opened(folder / PICTURES / record.pictures[name])
        if image is not None:
            found.append((name, embedded(image, _MOST_EVALUATION)))
    return found


def chosen(steps: Sequence[int], most: int) -> list[int]:
    """The first and the last step, and evenly spaced ones between them; at most `most`."""
    if len(steps) <= most:
        return [*steps]
    if most == 1:
        return [steps[-1]]
    return [steps[round(i * (len(steps) - 1) / (most - 1))] for i in range(most)]


def _prompts(record: RunRecord) -> list[str]:
    prompts = record.parameters.get("sample_prompts")
    return [str(prompt) for prompt in prompts] if isinstance(prompts, list) else []


def _cut(path: Path, shown: Sequence[ShownSample], side: int) -> list[Picture | None]:
    """Each sample of a step's picture; the whole picture where it is not known where they lie."""
    image = _opened(path)
    if image is None:
        return [None] * max(1, len(shown))
    if not shown:
        return [embedded(image, _MOST_EVALUATION)]
    pictures: list[Picture | None] = []
    for sample in shown:
        left, top, right, bottom = sample["box"]
        pictures.append(embedded(image.crop((left, top, right, bottom)), side))
    return pictures


def _taken(
    files: Mapping[int, Path], shown: Sequence[ShownSample], steps: Sequence[int], budget: int
) -> dict[int, list[Picture | None]]:
    """Step → its samples, at a size at which those of all steps fit into `budget` bytes. It is
    estimated from the last step."""
    side = _MOST_SIDE
    last = _cut(files[steps[-1]], shown, side)
    while (size := sum(len(p.uri) for p in last if p is not None) * len(steps)) > budget:
        largest = max(math.sqrt(p.width * p.height) for p in last if p is not None)
        if largest <= _LEAST_SIDE:
            break
        # A picture's size grows a little slower than its number of pixels.
        side = max(_LEAST_SIDE, int(largest * 0.9 * math.sqrt(budget / size)))
        last = _cut(files[steps[-1]], shown, side)
    others = {step: _cut(files[step], shown, side) for step in steps[:-1]}
    return {**others, steps[-1]: last}


def _opened(path: Path) -> Image.Image | None:
    """A picture, decoded; None if it is missing or cannot be read."""
    try:
        return read_image(path)
    except UNREADABLE:
        return None


def _clips(folder: Path, record: RunRecord, steps: Sequence[int]) -> dict[str, str]:
    """Name → content of the clips that fit into three quarters of the budget: those of the last
    step first, then of the first, then the others."""
    order = [*steps[-1:], *steps[:1], *reversed(steps[1:-1])]
    names = [f"step-{step}-{number}" for step in order for number in range(len(record.shown))]
    left, found = BUDGET * 3 // 4, dict[str, str]()
    for name in dict.fromkeys(names):
        path = folder / PICTURES / record.clips.get(name, "")
        try:
            size = path.stat().st_size * 4 // 3 if name in record.clips else left + 1
            if size <= left:
                found[name] = data_uri("video/mp4", path.read_bytes())
                left -= len(found[name])
        except OSError:
            continue
    return found
