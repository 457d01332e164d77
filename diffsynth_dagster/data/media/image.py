"""Images, from files to tensors.

Every image becomes RGB of 8 bits: its EXIF orientation is applied, palettes are resolved, grey and
CMYK are converted, 16 bits are scaled to 8, and alpha is dropped (the colour beneath it stays). Of
an animation the first frame is taken; `video` reads all of them.
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
from diffsynth_dagster.data.media.containers import cut_short
from diffsynth_dagster.facts import Facts, digest_file

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
    MemoryError,
    RuntimeError,
    Warning,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)
"""What Pillow's decoders raise for damaged files; warnings where these are made errors."""
_WANTED = "AVIF BMP DIB GIF ICO JPEG JPEG2000 MPO PCX PNG PPM PSD QOI SGI SUN TGA TIFF WEBP XBM"

_STRIP = 1 << 20
"""Pixels that are converted together."""

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


def as_rgb(image: Image.Image) -> Image.Image:
    """A decoded image (or frame) in RGB of 8 bits, upright."""
    image.load()
    if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):
        image = _without_low_bits(image)
    return image.convert("RGB")


def _without_low_bits(image: Image.Image) -> Image.Image:
    """Grey of 16 bits, in 16 or 32, as grey of 8: a strip at a time, in the depth that it has."""
    grey = Image.new("L", image.size)
    rows = max(1, _STRIP // image.width)
    for top in range(0, image.height, rows):
        strip = image.crop((0, top, image.width, min(top + rows, image.height)))
        high = (np.asarray(strip) >> 8).clip(0, 255).astype(np.uint8)
        grey.paste(Image.fromarray(high), (0, top))
    return grey


@contextmanager
def decoded(path: Path) -> Generator[Image.Image]:
    """An image as `read_image` reads it, counted in the budget `DECODING` while the block runs."""
    with open_image(path) as image, DECODING.hold(image.width * image.height):
        image.load()
        yield as_rgb(image)


def read_image(path: Path) -> Image.Image:
    """Decode an image completely as RGB with its orientation applied.

    Raises:
        PIL.Image.DecompressionBombError: it claims more pixels than Pillow deems safe.
        OSError, SyntaxError, ValueError, …: see `IMAGE_ERRORS`; it is damaged or of no known format.
    """
    with decoded(path) as image:
        return image


def image_facts(path: Path) -> Facts:
    """What a check of an image finds: `digest`, `width` and `height`, or `status` and `message`."""
    try:
        width, height = read_image(path).size
        missing = cut_short(path)
        if missing is not None:
            return {"status": "unreadable", "message": f"not a readable image: {missing}"}
        return {"digest": digest_file(path), "width": width, "height": height}
    except IMAGE_ERRORS as error:
        return media_problem(error, "image")


def media_problem(error: Exception, kind: str) -> Facts:
    """`status` and `message` for what reading a file raised."""
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

    Args:
        shown: (width, height) that the image is shown at, where its pixels are not square.
    """
    width, height = target
    shown = shown or image.size
    if image.size == shown == target:
        return image
    resized = image.resize(cover(*shown, target), Image.Resampling.BILINEAR)
    left, top = crop_place(*shown, target)
    return resized.crop((left, top, left + width, top + height))


def to_tensor(image: Image.Image) -> torch.Tensor:
    """RGB image → float32 (3, H, W) in [-1, 1]."""
    pixels = torch.from_numpy(np.array(image, dtype=np.uint8))
    return pixels.permute(2, 0, 1).float() / 127.5 - 1.0


def load_sample_image(path: Path, target: tuple[int, int]) -> torch.Tensor:
    """An image file at its trained size (width, height): float32 (3, height, width) in [-1, 1]."""
    with decoded(path) as image:
        return to_tensor(fit(image, target))
