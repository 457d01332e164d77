"""Pictures and animations that are small enough for Dagster's event log."""

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import dagster as dg

from diffsynth_dagster.report.words import data_uri

if TYPE_CHECKING:
    from PIL.Image import Image

    from diffsynth_dagster.report.charts import Chart

MAX_BYTES = 70_000
"""Largest image file. Base64 makes it a third larger, and one event should stay below 100 KB."""
MAX_ANIMATION_BYTES = 400_000
"""Largest animation. It needs more room, but an asset's page loads many events at once."""
MAX_ANIMATION_FRAMES = 240
_ANIMATION_WIDTH, _ANIMATION_COLUMNS = 640, 4
_BORDER = 2
_RED = (200, 40, 40)
_CURVES = (640, 260)


def inline(image: "Image", most_bytes: int = MAX_BYTES) -> dg.MarkdownMetadataValue:
    """An image inside markdown: a PNG, or if that is too large a JPEG that fits."""
    kind, data = next(item for item in _encodings(image) if len(item[1]) <= most_bytes)
    return _markdown(kind, data)


def _markdown(kind: str, data: bytes) -> dg.MarkdownMetadataValue:
    return dg.MetadataValue.md(f"![]({data_uri(f'image/{kind}', data)})")


def _encodings(image: "Image") -> Iterator[tuple[str, bytes]]:
    """(format, file content), each smaller than the one before, without end."""
    yield "png", _encoded(image, format="PNG", optimize=True)
    smaller = image.convert("RGB")
    while True:
        yield "jpeg", _encoded(smaller, format="JPEG", quality=80)
        side = max(1, int(smaller.width * 0.8)), max(1, int(smaller.height * 0.8))
        smaller = smaller.resize(side)


def _encoded(image: "Image", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, **options)
    return buffer.getvalue()


@dataclass(frozen=True)
class Shown:
    """A file on a contact sheet.

    Attributes:
        accepted: whether its row was accepted; a file of a rejected row gets a red border.
        frames: indices of the frames of a video to show side by side; None for an image.
    """

    path: Path
    accepted: bool
    frames: tuple[int, ...] | None = None


def contact_sheet(files: Sequence[Shown], side: int = 96, columns: int = 8) -> "Image | None":
    """Thumbnails of files, row by row; None if no file can be opened.

    Args:
        side: width and height of a thumbnail in pixels.
        columns: thumbnails in a row.
    """
    from PIL import Image

    from diffsynth_dagster.data.media.image import IMAGE_ERRORS, read_image
    from diffsynth_dagster.data.media.video import read_frames

    thumbnails: list[Image.Image] = []
    for file in files:
        try:
            if file.frames is None:
                images = [read_image(file.path)]
            else:
                images = read_frames(file.path, file.frames, most_side=side)
        except (*IMAGE_ERRORS, MemoryError, Image.DecompressionBombWarning):
            # An unreadable file is why its row was rejected: the row says so already. And a short
            # memory is no reason to fail the metadata for the sake of a picture.
            continue
        thumbnails += [_thumbnail(image, side, file.accepted) for image in images]
    if not thumbnails:
        return None
    rows = -(-len(thumbnails) // columns)  # rounded up
    sheet = Image.new("RGB", (min(columns, len(thumbnails)) * side, rows * side), "white")
    for index, cell in enumerate(thumbnails):
        sheet.paste(cell, (index % columns * side, index // columns * side))
    return sheet


def animation(clips: Sequence[Path]) -> dg.MarkdownMetadataValue | None:
    """Clips of one size side by side, cut to the shortest; None if there are no clips.

    The result is a WebP without sound: in markdown, Dagster's pages show images but no video.
    """
    from diffsynth_dagster.training.clips import read_frames
    from diffsynth_dagster.training.sampling import grid

    found = [clip for clip in clips if clip.is_file()]
    if not found:
        return None
    columns = min(len(found), _ANIMATION_COLUMNS)
    films = [read_frames(clip, most_width=_ANIMATION_WIDTH // columns) for clip in found]
    frames = [grid(together, columns) for together in zip(*(f.frames for f in films), strict=False)]
    # Long clips: take every n-th frame and show it n times as long.
    step = -(-len(frames) // MAX_ANIMATION_FRAMES)
    rate = films[0].frame_rate
    assert rate is not None, "a video file has a frame rate"
    return _markdown("webp", _film(frames[::step], round(1000 * step / rate)))


def _film(frames: "Sequence[Image]", milliseconds: int) -> bytes:
    """An endless WebP of at most `MAX_ANIMATION_BYTES`; frames are scaled down until it fits.

    Args:
        milliseconds: how long each frame is shown.
    """
    first, *others = frames
    options: dict[str, Any] = {"format": "WEBP", "save_all": True, "loop": 0, "quality": 70}
    data = _encoded(first, append_images=others, duration=milliseconds, **options)
    if len(data) <= MAX_ANIMATION_BYTES:
        return data
    # The file's size grows about with the area of its frames. At most 0.9, so that this ends.
    scale = min(0.9, (MAX_ANIMATION_BYTES / len(data)) ** 0.5)
    side = max(1, int(first.width * scale)), max(1, int(first.height * scale))
    return _film([frame.resize(side) for frame in frames], milliseconds)


def _thumbnail(image: "Image", side: int, accepted: bool) -> "Image":
    from PIL import Image, ImageDraw

    image.thumbnail((side, side))  # keeps the proportions; the rest of the cell stays white
    cell = Image.new("RGB", (side, side), "white")
    cell.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    if not accepted:
        ImageDraw.Draw(cell).rectangle((0, 0, side - 1, side - 1), outline=_RED, width=_BORDER)
    return cell


def stacked(titled: Sequence[tuple[str, Path]]) -> "Image | None":
    """Image files stacked vertically, each under its title; None if no file exists."""
    from PIL import Image, ImageDraw

    parts: list[tuple[str, Image.Image]] = []
    for title, path in titled:
        if path.is_file():
            with Image.open(path) as image:
                parts.append((title, image.convert("RGB")))
    if not parts:
        return None
    line = 14  # pixels: Pillow's default font, with a margin
    width = max(image.width for _, image in parts)
    sheet = Image.new("RGB", (width, sum(image.height + line for _, image in parts)), "white")
    draw, top = ImageDraw.Draw(sheet), 0
    for title, image in parts:
        draw.text((2, top + 1), title, fill="black")
        sheet.paste(image, (0, top + line))
        top += image.height + line
    return sheet


def curves(chart: "Chart") -> dg.MarkdownMetadataValue | None:
    """Losses over steps inside markdown, as SVG; None without any."""
    from diffsynth_dagster.report import svg

    parts = svg.chart(chart, _CURVES)
    return _markdown("svg+xml", svg.whole(*_CURVES, parts).encode()) if parts else None
