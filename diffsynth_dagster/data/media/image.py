"""Images, from files to tensors.

Every image becomes RGB of 8 bits: its EXIF orientation is applied, palettes are resolved, grey and
CMYK are converted, embedded colour profiles are converted to sRGB, 16 bits are scaled to 8, and alpha
is dropped (the colour beneath it stays) or laid on a background: see `colour`. Of an animation the
first frame is taken; `video` reads all of them.
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
"""What Pillow's decoders raise for damaged files; warnings where these are made errors. That memory is
not enough says nothing of a file."""
_WANTED = "AVIF BMP DIB GIF ICO JPEG JPEG2000 MPO PCX PNG PPM PSD QOI SGI SUN TGA TIFF WEBP XBM"
_AS_SHOWN = Look()
_MUCH_LARGER, _MANY_PIXELS = 4, 1 << 26
"""Where an image would be resized to so many times the pixels of its target, and to so many, it is
cropped before. What is cropped after stays, to the last bit, as it always was."""

Image.init()
IMAGE_FORMATS = tuple(name for name in _WANTED.split() if name in Image.OPEN)
"""Formats that Pillow reads by itself: no outside program is ever started for a file."""
# `open_image` refuses such images itself; the warning would appear besides.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


def open_image(path: Path) -> Image.Image:
    """Open an image without decoding it.

    Raises:
        PIL.Image.DecompressionBombError: it claims more pixels than Pillow deems safe.
        PIL.UnidentifiedImageError: it is of no format that is read.
        OSError, SyntaxError, ValueError, …: see `IMAGE_ERRORS`.
    """
    image = Image.open(path, formats=IMAGE_FORMATS)
    most = Image.MAX_IMAGE_PIXELS
    if most is not None and image.width * image.height > most:
        image.close()
        raise Image.DecompressionBombError(
            f"{image.width}x{image.height} pixels are more than the limit of {most}"
        )
    return image


def as_rgb(image: Image.Image, look: Look = _AS_SHOWN) -> Image.Image:
    """A decoded image (or frame) in RGB of 8 bits, upright.

    Raises:
        ValueError: see `colour.grey_bits`.
    """
    image.load()
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
    """An image as `read_image` reads it, counted in the budget `DECODING` while the block runs.

    Args:
        target: width and height that `fit` brings it to in the block.
    """
    with open_image(path) as image:
        pixels = image.width * image.height
        if target is not None:
            # Its sides may change places.
            for size in (image.size, (image.height, image.width)):
                pixels = max(pixels, _pixels_resized(size, target))
        with DECODING.hold(pixels):
            image.load()
            yield as_rgb(image, look)


def read_image(path: Path, look: Look = _AS_SHOWN) -> Image.Image:
    """Decode an image completely as RGB with its orientation applied.

    Raises:
        PIL.Image.DecompressionBombError: it claims more pixels than Pillow deems safe.
        OSError, SyntaxError, ValueError, …: see `IMAGE_ERRORS`; it is damaged or of no known format.
    """
    with decoded(path, look) as image:
        return image


def image_facts(path: Path) -> Facts:
    """What a check of an image finds: `digest`, `width`, `height` and `colour_facts`, or `status` and
    `message`. Raises MemoryError."""
    try:
        with open_image(path) as image, DECODING.hold(image.width * image.height):
            image.load()
            colours = colour_facts(image)
            width, height = as_rgb(image, Look(profile=False)).size
        missing = cut_short(path)
        if missing is not None:
            return {"status": "unreadable", "message": f"not a readable image: {missing}"}
        return {"digest": digest_file(path), "width": width, "height": height, **colours}
    except IMAGE_ERRORS as error:
        return media_problem(error, "image")


def media_problem(error: Exception, kind: str) -> Facts:
    """`status` and `message` for what reading a file raised.

    Raises:
        MemoryError: it says nothing of the file, but that memory is not enough.
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

    An image so thin that it would become many times as large as the target is cropped before: the
    same pixels, but for rounding.

    Args:
        shown: (width, height) that the image is shown at, where its pixels are not square.
    """
    width, height = target
    shown = shown or image.size
    if image.size == shown == target:
        return image
    wide, tall = cover(*shown, target)
    left, top = crop_place(*shown, target)
    if _is_cropped_first(shown, target):
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
    """The pixels of the largest image that `fit` makes."""
    wide, tall = target if _is_cropped_first(size, target) else cover(*size, target)
    return wide * tall


def to_tensor(image: Image.Image) -> torch.Tensor:
    """RGB image → float32 (3, H, W) in [-1, 1]."""
    pixels = torch.from_numpy(np.array(image, dtype=np.uint8))
    return pixels.permute(2, 0, 1).float() / 127.5 - 1.0


def load_sample_image(path: Path, target: tuple[int, int], look: Look = _AS_SHOWN) -> torch.Tensor:
    """An image file at its trained size (width, height): float32 (3, height, width) in [-1, 1]."""
    with decoded(path, look, target) as image:
        return to_tensor(fit(image, target))
