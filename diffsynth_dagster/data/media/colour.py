"""The colours of pictures: embedded profiles, more than 8 bits per channel, and transparency.

A picture with a colour profile (Display P3 of a phone, Adobe RGB, the CMYK of a press, a grey dot
gain) is converted to sRGB, in which models were trained. The conversion is relative colorimetric
with black point compensation, as in image editors, so that white stays white and black stays black.
A profile that is sRGB itself changes no byte. A profile that cannot be used, or that belongs to
another colour space than the picture, is ignored.
"""

import io
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from PIL import Image, ImageCms, TiffImagePlugin

from diffsynth_dagster.facts import Facts

_STRIP = 1 << 20
"""Pixels that are converted at once, so that the conversion needs little memory."""
_SAME = 3
"""A profile counts as sRGB if it changes no colour by more than this, in levels of 0..255. Profiles
of sRGB differ a little: they are rounded, and some are tables of few points."""
_SPACES = {
    "1": "L",
    "CMYK": "CMYK",
    "I": "L",
    "L": "L",
    "LA": "L",
    "P": "RGB",
    "PA": "RGB",
    "RGB": "RGB",
    "RGBA": "RGB",
    "RGBX": "RGB",
    "YCbCr": "RGB",
}
"""Pillow's mode of a picture → the mode that its profile applies to."""
_BACKGROUND, _PROFILE, _BITS = "background=", "srgb", "bits="


@dataclass(frozen=True)
class Look:
    """How the colours of a picture are read.

    Attributes:
        profile: whether an embedded profile is converted to sRGB.
        background: colour `#rrggbb` that fills transparent pixels; None drops the alpha channel,
            which leaves the colour stored in these pixels.
    """

    profile: bool = True
    background: str | None = None


def colour_facts(image: Image.Image) -> Facts:
    """Check the colours of a decoded picture or frame.

    Returns:
        `transparent`, whether any pixel is not opaque; and, only if pixel values are converted,
        `converted`: words that say how, as in `reading`.
    """
    words: list[str] = []
    bits = grey_bits(image)
    # 16 bits were always scaled to 8: without a word, the keys in existing stores stay valid.
    if bits not in (None, 16):
        words.append(f"{_BITS}{bits}")
    if to_srgb(image) is not None:
        words.append(_PROFILE)
    found: Facts = {"transparent": is_transparent(image)}
    return {**found, "converted": " ".join(words)} if words else found


def reading(facts: Mapping[str, Any], background: str | None, is_data: bool = False) -> str | None:
    """How the colours of a file are read, as part of the keys of its encoded samples.

    Args:
        facts: `colour_facts` of the file, or facts without them.
        background: the `background` parameter.
        is_data: whether the values are data, such as those of a mask, and not colours.

    Returns:
        Words separated by spaces; None if the values are used unchanged.
    """
    words = str(facts.get("converted", "")).split()
    if is_data:
        words = [word for word in words if word != _PROFILE]
    elif background is not None and facts.get("transparent"):
        words.append(_BACKGROUND + background)
    return " ".join(words) or None


def look_of(words: str | None) -> Look:
    """How the colours of a file are read: parses what `reading` returned."""
    parts = (words or "").split()
    backgrounds = [w.removeprefix(_BACKGROUND) for w in parts if w.startswith(_BACKGROUND)]
    return Look(_PROFILE in parts, backgrounds[0] if backgrounds else None)


def grey_bits(image: Image.Image) -> int | None:
    """Bits per pixel of a grey image with more than 8; None for any other image.

    Raises:
        ValueError: the values have 32 bits, and the file does not say which value is white.
    """
    # Pillow opens a TIFF with 12 bits of grey as 16 bits without scaling: only the tag tells.
    is_tiff = isinstance(image, TiffImagePlugin.TiffImageFile)
    tag: Any = image.tag_v2.get(TiffImagePlugin.BITSPERSAMPLE) if is_tiff else None
    bits = int(tag[0]) if isinstance(tag, tuple) and tag else 16
    if image.mode == "F" or (image.mode == "I" and bits > 16):
        kind = "floating-point numbers" if image.mode == "F" else "integers of 32 bits"
        raise ValueError(
            f"its values are {kind}, and nothing says which one is white: convert it to 8 or 16 bits"
        )
    if not image.mode.startswith("I"):
        return None
    return bits if 8 < bits < 16 else 16


def without_low_bits(image: Image.Image, bits: int) -> Image.Image:
    """Scale a grey image of `bits` bits per pixel to 8, by dropping the low bits."""
    grey = Image.new("L", image.size)
    for strip, top in _strips(image):
        high = (np.asarray(strip) >> (bits - 8)).clip(0, 255).astype(np.uint8)
        grey.paste(Image.fromarray(high), (0, top))
    return grey


def to_srgb(image: Image.Image) -> ImageCms.ImageCmsTransform | None:
    """The transform from an embedded profile to sRGB; None if the values are used unchanged."""
    profile = image.info.get("icc_profile")
    space = _SPACES.get(image.mode.partition(";")[0])  # a mode such as I;16 has a suffix
    if not isinstance(profile, bytes) or not profile or space is None:
        return None
    return _transform(profile, space)


@lru_cache(maxsize=16)
def _transform(profile: bytes, space: str) -> ImageCms.ImageCmsTransform | None:
    """The transform of `to_srgb`, cached. It holds no state, so threads may share it."""
    try:
        transform = ImageCms.buildTransform(
            ImageCms.ImageCmsProfile(io.BytesIO(profile)),
            ImageCms.createProfile("sRGB"),
            space,
            "RGB",
            ImageCms.Intent.RELATIVE_COLORIMETRIC,
            ImageCms.Flags.BLACKPOINTCOMPENSATION,
        )
    except (ImageCms.PyCMSError, OSError, TypeError, ValueError):
        return None  # a damaged profile, or one of another colour space
    # CMYK must be converted in any case.
    return None if space != "CMYK" and _changes_nothing(transform, space) else transform


def _changes_nothing(transform: ImageCms.ImageCmsTransform, space: str) -> bool:
    """Whether a transform leaves every colour as it is, apart from rounding. It is tried on 18
    levels of each primary, or on all levels of grey."""
    levels = np.linspace(0, 255, 18).round().astype(np.uint8)
    if space == "L":
        levels = np.arange(256, dtype=np.uint8)
    count = 1 if space == "L" else 3
    # All combinations of the levels, as an image of one row.
    grid = np.stack(np.meshgrid(*[levels] * count, indexing="ij"), axis=-1).reshape(1, -1, count)
    colours = Image.fromarray(grid[..., 0] if space == "L" else grid)
    transformed = np.asarray(transform.apply(colours)).astype(np.int16)
    return int(np.abs(transformed - grid).max()) <= _SAME


def converted(
    image: Image.Image, transform: ImageCms.ImageCmsTransform | None, background: str | None
) -> Image.Image:
    """Convert an image of at most 8 bits per channel to RGB.

    Args:
        transform: applied if it is not None; see `to_srgb`.
        background: see `Look`.
    """
    fill = background if background is not None and image.has_transparency_data else None
    if transform is None and fill is None:
        return image if image.mode == "RGB" else image.convert("RGB")
    result = Image.new("RGB", image.size)
    for strip, top in _strips(image):
        if transform is None:
            rgb = strip.convert("RGB")
        else:
            space = _SPACES[strip.mode]
            rgb = transform.apply(strip if strip.mode == space else strip.convert(space))
        if fill is not None:
            rgb = Image.composite(rgb, Image.new("RGB", rgb.size, fill), _alpha(strip))
        result.paste(rgb, (0, top))
    return result


def is_transparent(image: Image.Image) -> bool:
    """Whether any pixel of a decoded image is not opaque."""
    if not image.has_transparency_data or image.mode.startswith("I"):
        return False  # a transparent level of 16-bit grey is ignored
    return any(_least(_alpha(strip)) < 255 for strip, _ in _strips(image))


def _least(alpha: Image.Image) -> int:
    least: Any = alpha.getextrema()[0]  # (least, most) of the only channel
    return int(least)


def _alpha(image: Image.Image) -> Image.Image:
    return image.convert("RGBA").getchannel("A")


def _strips(image: Image.Image) -> Iterator[tuple[Image.Image, int]]:
    """Cut the image into strips of at most `_STRIP` pixels; yields each with its top row."""
    rows = max(1, _STRIP // image.width)
    for top in range(0, image.height, rows):
        yield image.crop((0, top, image.width, min(top + rows, image.height))), top
