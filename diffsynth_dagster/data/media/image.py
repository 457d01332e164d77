"""Read image files into tensors.

Every image is converted to upright RGB with 8 bits per channel: the EXIF orientation is applied;
palettes, grey, CMYK and embedded colour profiles are converted to sRGB; 16 bits are scaled to 8;
the alpha channel is dropped, or a background fills transparent pixels (see `colour`). Only the
first frame of an animation is read here; `video` reads all of them.
"""

import struct
import warnings
import zlib
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from diffsynth_dagster.data.geometry import cover, crop_place
from diffsynth_dagster.data.media.budget import DECODING
from diffsynth_dagster.data.media.colour import (
    Look,
    colour_facts,
    converted,
    grey_bits,
    to_srgb,
    without_low_bits,
)
from diffsynth_dagster.data.media.containers import cut_short
from diffsynth_dagster.data.media.signature import picture_signature
from diffsynth_dagster.facts import Facts, digest_file
from diffsynth_dagster.shortage import says_short

IMAGE_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    LookupError,
    TypeError,
    ArithmeticError,
    AttributeError,
    AssertionError,
    NotImplementedError,
    RuntimeError,
    Warning,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)
"""The exceptions that Pillow's decoders raise for damaged files, including warnings that a program
turns into errors. MemoryError is not among them: the file may be sound."""
_WANTED = "AVIF BMP DIB GIF ICO JPEG JPEG2000 MPO PCX PNG PPM PSD QOI SGI SUN TGA TIFF WEBP XBM"
_AS_SHOWN = Look()
_MUCH_LARGER, _MANY_PIXELS = 4, 1 << 26
"""`fit` crops before resizing if the resized image would have more pixels than both this many times
the target and this number. All others are cropped after, which keeps their pixels bit for bit."""

Image.init()
IMAGE_FORMATS = tuple(name for name in _WANTED.split() if name in Image.OPEN)
"""Formats that Pillow reads by itself. (For EPS, for example, it would start another program.)"""
# `open_image` raises an error for these images, so Pillow's warning is not needed.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


def open_image(path: Path) -> Image.Image:
    """Open an image without decoding it.

    Raises:
        PIL.Image.DecompressionBombError: it claims to have more pixels than Pillow considers safe.
        PIL.UnidentifiedImageError: its format is not among `IMAGE_FORMATS`.
        OSError, SyntaxError, ValueError, …: see `IMAGE_ERRORS`.
    """
    image = Image.open(path, formats=IMAGE_FORMATS)
    most = Image.MAX_IMAGE_PIXELS  # Pillow itself raises an error only at twice this number
    if most is not None and image.width * image.height > most:
        image.close()
        raise Image.DecompressionBombError(
            f"{image.width}x{image.height} pixels are more than the limit of {most}"
        )
    return image


def as_rgb(image: Image.Image, look: Look = _AS_SHOWN) -> Image.Image:
    """Convert a decoded image or frame to upright RGB with 8 bits per channel.

    Raises:
        ValueError: see `colour.grey_bits`.
    """
    image.load()
    # Before transposing: `grey_bits` reads the tags of a TIFF, which the result no longer has.
    bits, transform = grey_bits(image), to_srgb(image) if look.profile else None
    if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:
        image = ImageOps.exif_transpose(image)
    if bits is not None:
        image = without_low_bits(image, bits)
    return converted(image, transform, look.background)


@contextmanager
def decoded(
    path: Path, look: Look = _AS_SHOWN, target: tuple[int, int] | None = None
) -> Generator[Image.Image]:
    """Decode an image like `read_image`. Its pixels count in the budget `DECODING` while the block
    runs.

    Args:
        target: (width, height) if the block calls `fit` with it: the resized image counts too.
    """
    with open_image(path) as image:
        pixels = image.width * image.height
        if target is not None:
            # The orientation is not known yet; it may swap width and height.
            for size in (image.size, (image.height, image.width)):
                pixels = max(pixels, _pixels_resized(size, target))
        with DECODING.hold(pixels):
            image.load()
            yield as_rgb(image, look)


def read_image(path: Path, look: Look = _AS_SHOWN) -> Image.Image:
    """Decode an image completely as RGB with its orientation applied.

    Raises:
        PIL.Image.DecompressionBombError: see `open_image`.
        OSError, SyntaxError, ValueError, …: see `IMAGE_ERRORS`; it is damaged or of no known format.
    """
    with decoded(path, look) as image:
        return image


def image_facts(path: Path) -> Facts:
    """Check an image by decoding it.

    Returns:
        `digest`, `width` and `height` in pixels (upright), `signature` and `colour_facts`; or
        `status` and `message`.

    Raises:
        MemoryError: there is not enough memory to decode it.
    """
    try:
        with open_image(path) as image, DECODING.hold(image.width * image.height):
            image.load()
            colours = colour_facts(image)
            # Neither the size nor the signature needs a conversion of colours.
            rgb = as_rgb(image, Look(profile=False))
            sized = {"width": rgb.width, "height": rgb.height, "signature": picture_signature(rgb)}
        missing = cut_short(path)
        if missing is not None:
            return {"status": "unreadable", "message": f"not a readable image: {missing}"}
        return {"digest": digest_file(path), **sized, **colours}
    except IMAGE_ERRORS as error:
        return media_problem(error, "image")


def media_problem(error: Exception, kind: str) -> Facts:
    """`status` and `message` for an error that reading a file raised.

    Raises:
        MemoryError: the error means that there is not enough memory; the file may be sound.
    """
    if says_short(error) is not None:
        raise MemoryError(*error.args) from error
    if isinstance(error, Image.DecompressionBombError | Image.DecompressionBombWarning):
        return {"status": "too_large", "message": str(error)}
    if isinstance(error, FileNotFoundError):
        return {"status": "file_missing", "message": "the file does not exist"}
    if isinstance(error, UnidentifiedImageError):
        formats = ", ".join(IMAGE_FORMATS)
        why = f"it is damaged, or of a format other than {formats}"
        return {"status": "unreadable", "message": f"not a readable {kind}: {why}"}
    why = " ".join(str(error).split())[:300] or type(error).__name__
    return {"status": "unreadable", "message": f"not a readable {kind}: {why}"}


def fit(
    image: Image.Image, target: tuple[int, int], shown: tuple[int, int] | None = None
) -> Image.Image:
    """Resize (bilinear) so that the target (width, height) is covered, then crop the centre.

    A very thin image would become many times as large as the target. It is cropped before resizing,
    which gives the same pixels apart from rounding.

    Args:
        shown: (width, height) at which the image is displayed, if its pixels are not square.
    """
    width, height = target
    shown = shown or image.size
    if image.size == shown == target:
        return image
    wide, tall = cover(*shown, target)
    left, top = crop_place(*shown, target)
    if _is_cropped_first(shown, target):
        # The crop in coordinates of the original image; `resize` reads only this box.
        across, down = image.width / wide, image.height / tall
        right, bottom = (left + width) * across, (top + height) * down
        box = (left * across, top * down, min(right, image.width), min(bottom, image.height))
        return image.resize(target, Image.Resampling.BILINEAR, box=box)
    resized = image.resize((wide, tall), Image.Resampling.BILINEAR)
    return resized.crop((left, top, left + width, top + height))


def _is_cropped_first(size: tuple[int, int], target: tuple[int, int]) -> bool:
    wide, tall = cover(*size, target)
    return wide * tall > max(_MANY_PIXELS, _MUCH_LARGER * target[0] * target[1])


def _pixels_resized(size: tuple[int, int], target: tuple[int, int]) -> int:
    """Number of pixels of the largest image that `fit` makes."""
    wide, tall = target if _is_cropped_first(size, target) else cover(*size, target)
    return wide * tall


def to_tensor(image: Image.Image) -> torch.Tensor:
    """RGB image → float32 (3, H, W) in [-1, 1]."""
    pixels = torch.from_numpy(np.array(image, dtype=np.uint8))
    return pixels.permute(2, 0, 1).float() / 127.5 - 1.0


def load_sample_image(path: Path, target: tuple[int, int], look: Look = _AS_SHOWN) -> torch.Tensor:
    """Read an image file at its trained size (width, height).

    Returns:
        float32 (3, height, width) in [-1, 1].
    """
    with decoded(path, look, target) as image:
        return to_tensor(fit(image, target))
