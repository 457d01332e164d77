"""The loss curve of a training as an SVG picture, written without a plotting library."""

import csv
import math
from collections.abc import Mapping, Sequence
from itertools import accumulate
from pathlib import Path

# The picture and its margins, in pixels.
_WIDTH, _HEIGHT = 720, 260
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 12, 12, 34
# Points in a line at most, one for each two pixels. Each is the mean of a part of the training.
_POINTS = 360
# The running mean is taken over 1/20 of all steps.
_SMOOTHED = 20
_TEXT = '<text x="{}" y="{}" text-anchor="{}" font-family="sans-serif" font-size="12" fill="#555">{}</text>'
_LINE = '<polyline points="{}" fill="none" stroke="{}" stroke-width="{}" stroke-linejoin="round"/>'


def loss_svg(metrics: Path) -> str | None:
    """Draw the loss of each step in a pale color, and its running mean, as SVG.

    Args:
        metrics: `metrics.csv`. After a training was killed, its last line may be cut off.

    Returns:
        The SVG text; None if the file is missing, or no step in it has a finite loss.
    """
    losses = _losses(metrics)
    if not losses:
        return None
    steps = list(losses)
    window = max(2, len(steps) // _SMOOTHED)
    lines = [(_thinned(v), c, w) for v, c, w in _lines([*losses.values()], window)]
    numbers = _thinned(steps)
    # One scale for both lines, after averaging: a single spike does not flatten the curve.
    least, most = (f(value for values, _, _ in lines for value in values) for f in (min, max))
    parts = [_axes(steps[0], steps[-1], least, most)]
    for values, color, width in lines:
        points = _points(numbers, values, (steps[0], steps[-1]), (least, most))
        parts.append(_LINE.format(points, color, width))
    size = f'width="{_WIDTH}" height="{_HEIGHT}" viewBox="0 0 {_WIDTH} {_HEIGHT}"'
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img" aria-label="loss over steps">'
    )
    return "\n".join([head, '<rect width="100%" height="100%" fill="#fff"/>', *parts, "</svg>", ""])


def _losses(metrics: Path) -> Mapping[int, float]:
    """Step → finite loss, in the order of the steps. Lines that were cut off are skipped."""
    losses: dict[int, float] = {}
    if metrics.is_file():
        with metrics.open(newline="", encoding="utf-8", errors="replace") as file:
            for row in csv.DictReader(file):
                try:
                    step, loss = int(row["step"]), float(row["loss"])
                except (KeyError, TypeError, ValueError):
                    continue
                if math.isfinite(loss):
                    losses[step] = loss
    return dict(sorted(losses.items()))


def _lines(losses: Sequence[float], window: int) -> list[tuple[list[float], str, float]]:
    """Values, color and width of each line: all losses, and the running mean of `window` losses."""
    # Prefix sums give every mean in constant time, also for a million steps.
    sums = [0.0, *accumulate(losses)]
    starts = (max(0, end - window) for end in range(1, len(sums)))
    means = [(sums[i + 1] - sums[start]) / (i + 1 - start) for i, start in enumerate(starts)]
    return [([*losses], "#b8c4d6", 0.8), (means, "#2563a8", 1.8)]


def _thinned(values: Sequence[float]) -> list[float]:
    """Split the values into at most `_POINTS` parts of equal length, and average each part."""
    length = -(-len(values) // _POINTS)  # rounded up
    parts = (values[i : i + length] for i in range(0, len(values), length))
    return [sum(part) / len(part) for part in parts]


def _points(
    xs: Sequence[float],
    ys: Sequence[float],
    width: tuple[float, float],
    height: tuple[float, float],
) -> str:
    """The points of an SVG polyline, in pixels. A single point becomes a horizontal line."""
    across, up = _WIDTH - _LEFT - _RIGHT, _HEIGHT - _TOP - _BOTTOM
    if len(xs) == 1:
        xs, ys, width = (0, 1), (ys[0], ys[0]), (0, 1)
    return " ".join(
        # In SVG, y grows downwards.
        f"{_LEFT + across * _place(x, *width):.1f},{_TOP + up * (1 - _place(y, *height)):.1f}"
        for x, y in zip(xs, ys, strict=True)
    )


def _place(value: float, least: float, most: float) -> float:
    """Where a value lies between two others, from 0 to 1; 0.5 if those are equal."""
    return (value - least) / (most - least) if most > least else 0.5


def _axes(first: int, last: int, least: float, most: float) -> str:
    """The two axes, with the numbers at their ends and their titles."""
    right, bottom = _WIDTH - _RIGHT, _HEIGHT - _BOTTOM
    path = f"M{_LEFT} {_TOP}V{bottom}H{right}"
    texts = [
        (_LEFT - 8, _TOP + 10, "end", f"{most:.4g}"),
        (_LEFT - 8, bottom, "end", f"{least:.4g}"),
        (_LEFT, bottom + 20, "middle", first),
        (right, bottom + 20, "end", last),
        ((_LEFT + right) // 2, bottom + 20, "middle", "step"),
        (_LEFT - 8, (_TOP + bottom) // 2, "end", "loss"),
    ]
    frame = f'<path d="{path}" fill="none" stroke="#999"/>'
    return "\n".join([frame, *(_TEXT.format(*text) for text in texts)])
