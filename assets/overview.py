"""The picture of a training that its page shows first: sample pictures with their prompts, and curves.

An SVG, so that the browser draws the prompts: it has fonts for all scripts.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from diffsynth_dagster.report.charts import Chart
from diffsynth_dagster.report.svg import chart, cut, defined, placed, text, whole

if TYPE_CHECKING:
    from diffsynth_dagster.run.record import RunRecord, ShownSample

_WIDTH = 656
"""Pixels: what an asset's page has for its description in a window of 1280."""
_OPEN = 222
"""Height of what is to be seen at once: of a description Dagster shows 260 pixels, and its button
"Show more" over the last of them."""
_CHART = 190
_GAP = 4
_PROMPT, _LABEL = 17, 14
"""Heights of a line with a prompt, and of one with steps."""
_ALONE, _TOGETHER = 190, 88
"""Height of a sample where there is one prompt, and where there are more."""
_MOST = 240
"""How many samples are shown of all prompts together: steps in between are left out."""
_DENSE = 2
"""Pixels of a sample for each pixel on the page, for sharp screens."""
_WIDE = 3.0
"""Width by height of a sample from which only one of them is shown in a row."""


@dataclass(frozen=True)
class _Samples:
    """The sample pictures of a training.

    Attributes:
        files: step → picture.
        shown: where each sample lies in every picture, and its prompt.
        made: name → samples as parts of an SVG that were made before.
    """

    files: Mapping[int, Path]
    shown: "Sequence[ShownSample]"
    made: dict[str, str]

    @property
    def height(self) -> int:
        """Pixels that a sample has on the page."""
        return _ALONE if len(self.shown) == 1 else _TOGETHER

    def columns(self, width: int) -> tuple[int, int]:
        """How many samples stand beside each other in a width, and how wide each is."""
        boxes = [each["box"] for each in self.shown]
        aspect = max((b[2] - b[0]) / max(1, b[3] - b[1]) for b in boxes)
        least = 1 if aspect > _WIDE else 2
        cell = min(round(self.height * aspect), (width + _GAP) // least - _GAP)
        return max(1, (width + _GAP) // (cell + _GAP)), cell

    def defined(self, steps: Iterable[int], cell: int) -> Iterator[str]:
        """The samples of some steps, for use at any place."""
        from PIL import Image

        for step in steps:
            names = [f"s{step}-{index}" for index in range(len(self.shown))]
            if not self.made.keys() >= set(names):
                with Image.open(self.files[step]) as picture:
                    for name, each in zip(names, self.shown, strict=True):
                        left, top, right, bottom = each["box"]
                        sample = picture.crop((left, top, right, bottom))
                        sample.thumbnail((cell * _DENSE, self.height * _DENSE))
                        self.made[name] = defined(name, sample, (cell, self.height))
            yield from (self.made[name] for name in names)


def overview(
    record: "RunRecord",
    folder: Path,
    changed: Collection[Path] = (),
    made: dict[str, str] | None = None,
) -> str | None:
    """Samples and curves of a training as an SVG; None if it has neither yet.

    Args:
        folder: the run folder.
        changed: files that were changed since the training wrote them. They are not read.
        made: the samples that were made for an earlier picture of this training, so that not all are
            read again. New ones are added.
    """
    samples = _samples(record, folder / "samples", changed, {} if made is None else made)
    width = _WIDTH if samples is None else _CHART
    parts = chart(_losses(record, folder, changed), (width, _OPEN), (_WIDTH - width, 0))
    bottom = _OPEN if parts else 0
    if samples is not None:
        drawn, end = _drawn(samples, _WIDTH - _CHART - 2 * _GAP if parts else _WIDTH)
        parts, bottom = [*drawn, *parts], max(bottom, end)
    return whole(_WIDTH, bottom, parts) if parts else None


def _losses(record: "RunRecord", folder: Path, changed: Collection[Path]) -> Chart:
    """The losses of all steps, and what was measured on held-out rows."""
    from diffsynth_dagster.report.metrics import read_metrics
    from diffsynth_dagster.report.summary import held_out_charts
    from diffsynth_dagster.run.record import LOGS

    charts = held_out_charts(record)[:1]
    if folder / LOGS[0] not in changed:
        charts.insert(0, read_metrics(folder).loss_chart())
    return Chart("Loss", "", "loss", [line for each in charts for line in each.lines])


def _samples(
    record: "RunRecord", folder: Path, changed: Collection[Path], made: dict[str, str]
) -> _Samples | None:
    """The sample pictures that can be shown; None if there are none."""
    from PIL import Image

    every = {step: folder / file for step, file in record.sample_pictures.items()}
    files = {step: path for step, path in every.items() if path not in changed and path.is_file()}
    if not files:
        return None
    shown: Sequence[ShownSample] = record.shown
    if not shown:  # An older version wrote the record: the pictures are shown as they are.
        with Image.open(next(iter(files.values()))) as picture:
            shown = [{"prompt": "", "box": [0, 0, *picture.size]}]
    return _Samples(files, shown, made)


def _drawn(samples: _Samples, width: int) -> tuple[list[str], int]:
    """Each prompt with some of its samples, then, if these are not all, each with all of them.

    Args:
        width: of the first part; the curves are beside it.

    Returns:
        Parts of an SVG, and where they end.
    """
    from diffsynth_dagster.report.pictures import chosen

    columns, cell = samples.columns(width)
    few = chosen(list(samples.files), columns)
    every = chosen(list(samples.files), max(columns, _MOST // len(samples.shown)))
    parts = list(samples.defined(sorted({*few, *every}), cell))
    parts += [text(f"step {step}", k * (cell + _GAP), 11, 11) for k, step in enumerate(few)]
    top = _LABEL
    for index, each in enumerate(samples.shown):
        parts += _prompt(each["prompt"], top, width if top < _OPEN else _WIDTH)
        top += _PROMPT
        parts += _row(few, index, cell, top)
        top += samples.height + _GAP
    if len(few) == len(samples.files):
        return parts, top
    columns = max(1, (_WIDTH + _GAP) // (cell + _GAP))
    for index, each in enumerate(samples.shown):
        top += _PROMPT
        parts += _prompt(each["prompt"], top, _WIDTH)
        top += _PROMPT
        for first in range(0, len(every), columns):
            row = every[first : first + columns]
            parts += [
                text(f"step {step}", k * (cell + _GAP), top + 11, 11) for k, step in enumerate(row)
            ]
            parts += _row(row, index, cell, top + _LABEL)
            top += _LABEL + samples.height + _GAP
    return parts, top


def _prompt(prompt: str, top: int, width: int) -> list[str]:
    return [text(cut(prompt, width, 13), 0, top + 13, 13)]


def _row(steps: Sequence[int], index: int, cell: int, top: int) -> list[str]:
    """The samples of a prompt beside each other."""
    return [placed(f"s{step}-{index}", k * (cell + _GAP), top) for k, step in enumerate(steps)]
