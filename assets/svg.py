"""Parts of an SVG picture: texts that are cut to a width, pictures, and curves of losses."""

import base64
import html
import io
import math
import unicodedata
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.Image import Image

Line = tuple[Sequence[float], Sequence[float]]
"""Steps, and the losses at them."""
_COLOURS = ("#1f4e9c", "#d0651b", "#3b8a3e")
_PALE, _GREY = "#b8c4d6", "#666"
_NARROW = 0.52
"""Width of most letters by the size of the font; letters such as Chinese ones are as wide as that."""


def whole(width: int, height: int, parts: Sequence[str]) -> str:
    """An SVG of a size in pixels."""
    size = f'width="{width}" height="{height}" viewBox="0 0 {width} {height}"'
    start = f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif">'
    # The page may be dark.
    white = f'<rect width="{width}" height="{height}" fill="white"/>'
    return "\n".join([start, white, *parts, "</svg>\n"])


def text(words: str, x: float, y: float, size: int, colour: str = "#222", end: bool = False) -> str:
    """A line of text. `x`, `y`: where its base line begins, or where it ends."""
    # Characters that are not printable may not be in XML at all.
    said = html.escape("".join(c if c.isprintable() else " " for c in words))
    anchor = ' text-anchor="end"' if end else ""
    return f'<text x="{x:g}" y="{y:g}" font-size="{size}" fill="{colour}"{anchor}>{said}</text>'


def cut(words: str, width: float, size: int) -> str:
    """As much of a text as has room, with "…" if that is not all."""
    room = width / size
    for index, character in enumerate(words):
        room -= 1 if unicodedata.east_asian_width(character) in "WF" else _NARROW
        if room < 1:
            rest = words[index + 1 :]
            return words if len(rest) <= 1 else f"{words[: index + 1].rstrip()}…"
    return words


def defined(name: str, picture: "Image", size: tuple[int, int]) -> str:
    """A picture that `placed` puts into any places, scaled to fit into a size, at its upper left."""
    buffer = io.BytesIO()
    picture.convert("RGB").save(buffer, format="JPEG", quality=85)
    address = f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"
    fit = f'width="{size[0]}" height="{size[1]}" preserveAspectRatio="xMinYMin meet"'
    return f'<defs><image id="{name}" {fit} href="{address}"/></defs>'


def placed(name: str, x: int, y: int) -> str:
    """The picture of this name, with its upper left corner at a place."""
    return f'<use href="#{name}" x="{x}" y="{y}"/>'


def chart(lines: Mapping[str, Line], box: tuple[int, int, int, int], pale: str = "") -> list[str]:
    """Curves over steps. Those of different length share their axes.

    Args:
        lines: name → line, all numbers finite, one of them not empty.
        box: left, top, width and height in pixels, with legend and numbers.
        pale: name of a line in the background, which may leave the chart at its top.
    """
    left, top, width, height = box
    legend = top + 14 * len(lines)
    x0, x1, y0, y1 = left + 38, left + width - 4, top + height - 18, legend + 6
    steps = [step for line in lines.values() for step in line[0]]
    # A single outlier of a single step would flatten all the others.
    most = [y for name, (_, losses) in lines.items() if name != pale for y in losses] or [
        y for _, losses in lines.values() for y in losses
    ]
    low, high = min(most), max(most)
    margin = 0.08 * (high - low) or 0.1 * abs(high) or 1.0
    low, high = low - margin, high + margin
    first, last = min(steps), max(steps)

    def place(step: float, loss: float) -> str:
        x = x0 + (step - first) / ((last - first) or 1) * (x1 - x0)
        y = y0 + (min(max(loss, low), high) - low) / (high - low) * (y1 - y0)
        return f"{x:.1f},{y:.1f}"

    parts = [f'<path d="M{x0},{y1}V{y0}H{x1}" fill="none" stroke="{_GREY}"/>']
    for share in (0.0, 0.5, 1.0):
        y = y0 + share * (y1 - y0)
        number = f"{low + share * (high - low):.3g}"
        parts.append(text(number, x0 - 4, y + 4, 10, _GREY, end=True))
        parts.append(f'<path d="M{x0},{y:g}H{x1}" stroke="#ddd"/>' if share else "")
    parts.append(text(f"step {first:g}", x0, y0 + 14, 10, _GREY))
    parts.append(text(f"{last:g}", x1, y0 + 14, 10, _GREY, end=True))
    colours = iter(_COLOURS)
    for row, (name, (numbers, losses)) in enumerate(lines.items()):
        colour = _PALE if name == pale else next(colours)
        points = " ".join(map(place, numbers, losses))
        stroke = f'fill="none" stroke="{colour}" stroke-width="{1 if name == pale else 2}"'
        parts.append(f'<polyline points="{points}" {stroke}/>')
        if len(numbers) < 3:
            x, y = place(numbers[-1], losses[-1]).split(",")
            parts.append(f'<circle cx="{x}" cy="{y}" r="3" fill="{colour}"/>')
        parts.append(
            f'<path d="M{x0},{top + 14 * row + 8}h14" stroke="{colour}" stroke-width="3"/>'
        )
        parts.append(text(name, x0 + 20, top + 14 * row + 12, 11))
    return [part for part in parts if part]


def thinned(line: Line, points: int) -> Line:
    """A line with at most so many points: each is the mean of those that it stands for. Numbers that
    are not finite are left out."""
    pairs = [(s, y) for s, y in zip(*line, strict=True) if math.isfinite(y)]
    each = max(1, -(-len(pairs) // points))
    groups = [pairs[k : k + each] for k in range(0, len(pairs), each)]
    return (
        [group[-1][0] for group in groups],
        [sum(loss for _, loss in group) / len(group) for group in groups],
    )
