"""Parts of an SVG picture: texts that are cut to a width, pictures, and curves."""

import html
import io
import unicodedata
from collections.abc import Sequence
from typing import TYPE_CHECKING

from diffsynth_dagster.report.charts import Chart, Frame, plot
from diffsynth_dagster.report.words import data_uri

if TYPE_CHECKING:
    from PIL.Image import Image

_COLOURS = ("#1f4e9c", "#d0651b", "#3b8a3e")
_PALE, _GREY = "#b8c4d6", "#666"
_NARROW_CHART = 300
_ROW = 14
"""Height of a name above a chart."""
_NARROW = 0.52
"""Width of most letters by the size of the font; letters such as Chinese ones are as wide as that."""


def whole(width: int, height: int, parts: Sequence[str]) -> str:
    """An SVG of a size in pixels."""
    size = f'width="{width}" height="{height}" viewBox="0 0 {width} {height}"'
    start = f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif">'
    # The page may be dark.
    white = f'<rect width="{width}" height="{height}" fill="white"/>'
    return "\n".join([start, white, *parts, "</svg>\n"])


def text(words: str, x: float, y: float, size: int, colour: str = "#222", anchor: str = "") -> str:
    """A line of text. `x`, `y`: where its base line begins; with the anchor "end" where it ends, with
    "middle" its middle."""
    # Characters that are not printable may not be in XML at all.
    said = html.escape("".join(c if c.isprintable() else " " for c in words))
    place = f' text-anchor="{anchor}"' if anchor else ""
    return f'<text x="{x:g}" y="{y:g}" font-size="{size}" fill="{colour}"{place}>{said}</text>'


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
    address = data_uri("image/jpeg", buffer.getvalue())
    fit = f'width="{size[0]}" height="{size[1]}" preserveAspectRatio="xMinYMin meet"'
    return f'<defs><image id="{name}" {fit} href="{address}"/></defs>'


def placed(name: str, x: int, y: int) -> str:
    """The picture of this name, with its upper left corner at a place."""
    return f'<use href="#{name}" x="{x}" y="{y}"/>'


def chart(shown: Chart, size: tuple[int, int], at: tuple[int, int] = (0, 0)) -> list[str]:
    """Curves over steps, under their names. No parts if there is no finite value.

    Args:
        size: width and height in pixels, with names and numbers.
        at: the upper left corner.
    """
    width, height = size
    narrow = width < _NARROW_CHART
    frame = Frame(
        *(width, height, 38 if narrow else 58, 6, _ROW * len(shown.lines) + 6, 18),
        across=2 if narrow else 6,
        up=3,
        most_points=width,
        most_dots=12,
        outliers=1.0,  # the mean is what matters: it has the whole height
    )
    laid = plot(shown, frame)
    if laid is None:
        return []
    left, right, bottom = frame.left, width - frame.right, height - frame.bottom
    parts = [f'<g transform="translate({at[0]} {at[1]})">']
    parts.append(text(shown.value, left - 4, 12, 11, anchor="end"))
    for tick in laid.up:
        parts.append(f'<path d="M{left} {tick.at:g}H{right}" stroke="#ddd"/>')
        parts.append(text(tick.text, left - 4, tick.at + 4, 10, _GREY, "end"))
    parts.append(f'<path d="M{left} {frame.top}V{bottom}H{right}" fill="none" stroke="{_GREY}"/>')
    parts.append(text("step", left - 10, bottom + 14, 10, _GREY, "end"))
    parts += [text(tick.text, tick.at, bottom + 14, 10, _GREY, "middle") for tick in laid.across]
    for row, line in enumerate(laid.lines):
        colour = _PALE if line.color < 0 else _COLOURS[line.color % len(_COLOURS)]
        stroke = f'fill="none" stroke="{colour}" stroke-width="{1 if line.color < 0 else 2}"'
        parts.append(f'<path class="line" d="{line.path}" {stroke} stroke-linejoin="round"/>')
        dots = line.hovers if line.dots else []
        parts += [f'<circle cx="{p.x:g}" cy="{p.y:g}" r="2.5" fill="{colour}"/>' for p in dots]
        top = _ROW * row
        parts.append(f'<path d="M{left} {top + 8}h14" stroke="{colour}" stroke-width="3"/>')
        parts.append(text(line.name, left + 20, top + 12, 11))
    return [*parts, "</g>"]
