"""The colours of pictures: embedded profiles, depths of more than 8 bits, and what is transparent.

A picture with a colour profile (Display P3 of a phone, Adobe RGB, the CMYK of a press, a grey dot
gain) is converted to sRGB, in which models were trained: relative colorimetric with black point
compensation, as image editors do, so that white stays white and black black. A profile that is
sRGB itself changes no byte. One that cannot be used, or is of another colour space than the
picture, is left out.
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
"""Pixels that are converted together."""
_SAME = 3
"""Levels of 255 by which a profile that is taken for sRGB may differ from it: profiles of sRGB are
rounded, some to few points."""
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
"""Pillow's mode of a picture → the mode in which its profile is about it."""
_BACKGROUND, _PROFILE, _BITS = "background=", "srgb", "bits="


@dataclass(frozen=True)
class Look:
    """How the colours of a picture are read.

    Attributes:
        profile: whether they are converted from an embedded profile to sRGB.
        background: colour `#rrggbb` that transparent pixels are laid on; None drops the alpha, and
            shows the colour that lies beneath.
    """

    profile: bool = True
    background: str | None = None


def colour_facts(image: Image.Image) -> Facts:
    """What a check finds of a decoded picture (or frame).

    Returns:
        `transparent`, whether a pixel of it is not opaque; `converted`, only where its values are
        not taken as they are: words that say what is done with them.
    """
    words: list[str] = []
    bits = grey_bits(image)
    if bits not in (None, 16):
        words.append(f"{_BITS}{bits}")
    if to_srgb(image) is not None:
        words.append(_PROFILE)
    found: Facts = {"transparent": is_transparent(image)}
    return {**found, "converted": " ".join(words)} if words else found


def reading(facts: Mapping[str, Any], background: str | None, is_data: bool = False) -> str | None:
    """How a file is read beside its sizes, which is part of the keys of what is encoded from it.

    Args:
        facts: `colour_facts` of the file, or facts without them.
        background: the colour asked for.
        is_data: whether its values are numbers and no colours, such as those of a mask.

    Returns:
        Words separated by spaces; None where its values are taken as they are.
    """
    words = str(facts.get("converted", "")).split()
    if is_data:
        words = [word for word in words if word != _PROFILE]
    elif background is not None and facts.get("transparent"):
        words.append(_BACKGROUND + background)
    return " ".join(words) or None


def look_of(words: str | None) -> Look:
    """How the colours of a file are read, of the words that `reading` gave."""
    said = (words or "").split()
    backgrounds = [w.removeprefix(_BACKGROUND) for w in said if w.startswith(_BACKGROUND)]
    return Look(_PROFILE in said, backgrounds[0] if backgrounds else None)


def grey_bits(image: Image.Image) -> int | None:
    """Bits of the grey of an image of more than 8; None for any other image.

    Raises:
        ValueError: it has numbers of 32 bits, of which nothing says which one is white.
    """
    is_tiff = isinstance(image, TiffImagePlugin.TiffImageFile)
    said: Any = image.tag_v2.get(TiffImagePlugin.BITSPERSAMPLE) if is_tiff else None
    bits = int(said[0]) if isinstance(said, tuple) and said else 16
    if image.mode == "F" or (image.mode == "I" and bits > 16):
        kind = "floating-point numbers" if image.mode == "F" else "integers of 32 bits"
        raise ValueError(
            f"its values are {kind}, and nothing says which one is white: convert it to 8 or 16 bits"
        )
    if not image.mode.startswith("I"):
        return None
    return bits if 8 < bits < 16 else 16


def without_low_bits(image: Image.Image, bits: int) -> Image.Image:
    """Grey of this many bits, in 16 or 32, as grey of 8."""
    grey = Image.new("L", image.size)
    for strip, top in _strips(image):
        high = (np.asarray(strip) >> (bits - 8)).clip(0, 255).astype(np.uint8)
        grey.paste(Image.fromarray(high), (0, top))
    return grey


def to_srgb(image: Image.Image) -> ImageCms.ImageCmsTransform | None:
    """The transform from an image's embedded profile to sRGB; None where its values are taken as they
    are."""
    profile = image.info.get("icc_profile")
    space = _SPACES.get(image.mode.partition(";")[0])
    if not isinstance(profile, bytes) or not profile or space is None:
        return None
    return _transform(profile, space)


@lru_cache(maxsize=16)
def _transform(profile: bytes, space: str) -> ImageCms.ImageCmsTransform | None:
    """See `to_srgb`. Transforms hold no state: any number of threads may use one."""
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
        return None
    return None if space != "CMYK" and _changes_nothing(transform, space) else transform


def _changes_nothing(transform: ImageCms.ImageCmsTransform, space: str) -> bool:
    """Whether every colour stays as it is, but for rounding: 18 levels of each primary are tried."""
    levels = np.linspace(0, 255, 18).round().astype(np.uint8)
    if space == "L":
        levels = np.arange(256, dtype=np.uint8)
    count = 1 if space == "L" else 3
    grid = np.stack(np.meshgrid(*[levels] * count, indexing="ij"), axis=-1).reshape(1, -1, count)
    tried = Image.fromarray(grid[..., 0] if space == "L" else grid)
    made = np.asarray(transform.apply(tried)).astype(np.int16)
    return int(np.abs(made - grid).max()) <= _SAME


def converted(
    image: Image.Image, transform: ImageCms.ImageCmsTransform | None, background: str | None
) -> Image.Image:
    """An image of at most 8 bits in RGB: by a transform where there is one, and on a background.

    Args:
        background: see `Look`.
    """
    laid = background if background is not None and image.has_transparency_data else None
    if transform is None and laid is None:
        return image.convert("RGB")
    result = Image.new("RGB", image.size)
    for strip, top in _strips(image):
        if transform is None:
            rgb = strip.convert("RGB")
        else:
            space = _SPACES[strip.mode]
            rgb = transform.apply(strip if strip.mode == space else strip.convert(space))
        if laid is not None:
            rgb = Image.composite(rgb, Image.new("RGB", rgb.size, laid), _alpha(strip))
        result.paste(rgb, (0, top))
    return result


def is_transparent(image: Image.Image) -> bool:
    """Whether a pixel of a decoded image is not opaque."""
    if not image.has_transparency_data or image.mode.startswith("I"):
        return False
    return any(_least(_alpha(strip)) < 255 for strip, _ in _strips(image))


def _least(alpha: Image.Image) -> int:
    least: Any = alpha.getextrema()[0]  # of the one channel
    return int(least)


def _alpha(image: Image.Image) -> Image.Image:
    return image.convert("RGBA").getchannel("A")


def _strips(image: Image.Image) -> Iterator[tuple[Image.Image, int]]:
    """The image in strips of few pixels, each with its first row."""
    rows = max(1, _STRIP // image.width)
    for top in range(0, image.height, rows):
        yield image.crop((0, top, image.width, min(top + rows, image.height))), top
