"""Charts as plain data: lines over steps become coordinates, which the report's template draws as SVG,
and `report.svg` as a picture of its own."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from diffsynth_dagster.report.words import amount, whole

_MOST_HOVERS = 60
"""Places of a line at which a value is shown when the mouse is over them."""

Point = tuple[float, float]


@dataclass(frozen=True)
class Line:
    """A line of a chart.

    Attributes:
        points: (step, value), in the order of the steps. Values that are not finite are left out.
        pale: drawn thin in the background; some of its values may lie outside of the chart.
    """

    name: str
    points: Sequence[Point]
    pale: bool = False


@dataclass(frozen=True)
class Chart:
    """Lines over steps.

    Attributes:
        note: one sentence that says how to read it.
        value: what the values are.
        mark: a step to mark, and what it is.
    """

    title: str
    note: str
    value: str
    lines: Sequence[Line]
    mark: tuple[float, str] | None = None


@dataclass(frozen=True)
class Frame:
    """The size of a chart and its margins in pixels, and what it has room for.

    Attributes:
        across, up: about how many numbers stand at the axes.
        most_points: of a line. Of a longer one, the least and the greatest value of each part are shown.
        most_dots: lines of at most so many points are drawn with a dot at each.
        outliers: the share of a pale line's values that may lie above and below the chart, in all.
    """

    width: int = 560
    height: int = 250
    left: int = 66
    right: int = 14
    top: int = 12
    bottom: int = 40
    across: int = 6
    up: int = 5
    most_points: int = 1000
    most_dots: int = 30
    outliers: float = 0.01


@dataclass(frozen=True)
class Tick:
    """A number at an axis, and its place."""

    at: float
    text: str


@dataclass(frozen=True)
class Hover:
    """A place at which the text of a value appears."""

    x: float
    y: float
    text: str


@dataclass(frozen=True)
class Drawn:
    """A line as it is drawn.

    Attributes:
        path: the commands of an SVG path.
        color: number of its colour, from 0; -1 for a pale line.
        dots: whether each of its points is drawn.
    """

    name: str
    path: str
    color: int
    dots: bool
    hovers: Sequence[Hover] = field(default_factory=list[Hover])


@dataclass(frozen=True)
class Plot:
    """A chart with the coordinates of all that is drawn."""

    chart: Chart
    frame: Frame
    lines: Sequence[Drawn]
    across: Sequence[Tick]
    up: Sequence[Tick]
    mark_at: float | None


def plot(chart: Chart, frame: Frame | None = None) -> Plot | None:
    """Lay out a chart; None if it has no finite value.

    Args:
        frame: None: that of the report's charts.
    """
    frame = frame or Frame()
    lines = [(line, [p for p in line.points if math.isfinite(p[1])]) for line in chart.lines]
    lines = [(line, points) for line, points in lines if points]
    if not lines:
        return None
    steps = [step for _, points in lines for step, _ in points]
    first, last = min(steps), max(max(steps), min(steps) + 1)
    values = [v for line, points in lines for v in _shown(line, points, frame.outliers)]
    values = values or [value for _, points in lines for _, value in points]
    up = _ticks(min(values), max(values), frame.up)
    low, high = min(up[0], *values), max(up[-1], *values)

    def x(step: float) -> float:
        share = (step - first) / (last - first)
        return round(frame.left + share * (frame.width - frame.left - frame.right), 1)

    def y(value: float) -> float:
        share = (value - low) / (high - low)
        height = frame.height - frame.top - frame.bottom
        return round(frame.height - frame.bottom - min(max(share, 0), 1) * height, 1)

    drawn: list[Drawn] = []
    for line, points in lines:
        color = -1 if line.pale else sum(each.color >= 0 for each in drawn)
        hovers = [] if line.pale else _hovers(line, points, x, y)
        dots = len(points) <= frame.most_dots and not line.pale
        path = _path(thinned(points, frame.most_points), x, y)
        drawn.append(Drawn(line.name, path, color, dots, hovers))
    across = [t for t in _ticks(first, last, frame.across) if first <= t <= last and t == int(t)]
    return Plot(
        chart,
        frame,
        drawn,
        [Tick(x(step), whole(step)) for step in across],
        [Tick(y(v), text) for v, text in zip(up, _texts(up), strict=True) if low <= v <= high],
        None if chart.mark is None else x(min(max(chart.mark[0], first), last)),
    )


def _shown(line: Line, points: Sequence[Point], outliers: float) -> Sequence[float]:
    """The values of a line that decide the range of its chart."""
    values = sorted(value for _, value in points)
    left_out = int(len(values) * outliers / 2) if line.pale else 0
    return values[left_out : len(values) - left_out]


def _ticks(low: float, high: float, count: int) -> list[float]:
    """About `count` round numbers that enclose a range."""
    if high <= low:
        low, high = low - (abs(low) or 1) * 0.1, high + (abs(high) or 1) * 0.1
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * m for m in (1, 2, 2.5, 5, 10) if power * m >= rough * 0.999)
    numbers = range(math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9) + 1)
    # Rounded: 3 * 0.1 is not 0.3.
    return [float(f"{n * step:.12g}") for n in numbers]


def _texts(ticks: Sequence[float]) -> list[str]:
    """Round numbers as text, all with as many decimals as the longest needs."""
    texts = [f"{value:.6g}" for value in ticks]
    if any("e" in text for text in texts):
        return texts
    decimals = max(len(text.partition(".")[2]) for text in texts)
    return [f"{value:,.{decimals}f}" for value in ticks]


def _path(points: Sequence[Point], x: Callable[..., float], y: Callable[..., float]) -> str:
    places = [f"{x(step):g} {y(value):g}" for step, value in points]
    return "M" + "L".join(places)


def thinned(points: Sequence[Point], most: int) -> Sequence[Point]:
    """At most `most` points: of each part of a longer line, its least and its greatest value."""
    if len(points) <= most:
        return points
    parts = max(1, most // 2)
    found: list[Point] = []
    for number in range(parts):
        part = points[number * len(points) // parts : (number + 1) * len(points) // parts]
        extremes = {min(part, key=lambda p: p[1]), max(part, key=lambda p: p[1])}
        found += sorted(extremes)
    return found


def _hovers(
    line: Line, points: Sequence[Point], x: Callable[..., float], y: Callable[..., float]
) -> list[Hover]:
    count = min(len(points), _MOST_HOVERS)
    chosen = {round(i * (len(points) - 1) / max(1, count - 1)) for i in range(count)}
    return [
        Hover(x(step), y(value), f"{line.name}, step {whole(step)}: {amount(value)}")
        for step, value in (points[i] for i in sorted(chosen))
    ]
