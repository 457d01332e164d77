"""The demo's data set: handwritten digits as 64x64 PNG files with a `metadata.csv`.

The images are the 1,797 8x8 scans that come with scikit-learn, so nothing is downloaded. Eights and
nines are the *new* concept that the demo's LoRA learns; the demo's base model already knows zero to
seven. `write_new_digits` and `write_old_digits` have the signature that a recipe's
`customized_dataset` needs: they fill the folder that they are given and return nothing.
"""

import csv
import io
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from diffsynth_dagster.errors import UserError

DIGIT_NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
NEW_DIGITS = (8, 9)
OLD_DIGITS = tuple(range(8))
IMAGE_SIZE = 64
"""Side of the written images, in pixels."""
SOURCE_SIZE = 8
"""Side of the source scans, in pixels."""
SOURCE_LEVELS = 16
"""The source scans have grey levels 0..16, where 16 is full ink."""
HELD_OUT_EVERY = 5
"""Every fifth scan is held out: no model is trained on it."""
REHEARSED_PER_DIGIT = 12
"""Rows of each old digit in the new data set, so that the LoRA does not make the model forget it."""


@dataclass(frozen=True)
class Scans:
    """Scans of handwritten digits.

    Attributes:
        grey: ink in 0..1, float64 of shape (N, 8, 8).
        digit: which digit each scan shows, int64 of shape (N,).
        index: position of each scan in scikit-learn's data set, int64 of shape (N,).
    """

    grey: NDArray[np.float64]
    digit: NDArray[np.int64]
    index: NDArray[np.int64]

    def where(self, chosen: NDArray[np.bool_]) -> "Scans":
        """The scans whose entry in `chosen`, bool (N,), is true, in the same order."""
        return Scans(self.grey[chosen], self.digit[chosen], self.index[chosen])


def prompt_of(digit: int) -> str:
    """The caption of a digit: `prompt_of(8) == "a handwritten eight"`."""
    return f"a handwritten {DIGIT_NAMES[digit]}"


def load_scans(*, held_out: bool = False) -> Scans:
    """Load scikit-learn's digits: the training split, or the held-out split that no model sees.

    Raises:
        UserError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise UserError(
            "The demo's handwritten digits come with scikit-learn, which is not installed.",
            do="pip install scikit-learn",
        ) from error
    pixels, digit = cast("tuple[Any, Any]", load_digits(return_X_y=True))
    index = np.arange(len(digit), dtype=np.int64)
    grey = np.asarray(pixels, dtype=np.float64).reshape(-1, SOURCE_SIZE, SOURCE_SIZE)
    scans = Scans(grey / SOURCE_LEVELS, np.asarray(digit, dtype=np.int64), index)
    return scans.where((index % HELD_OUT_EVERY == 0) == held_out)


def draw(grey: NDArray[np.float64]) -> Image.Image:
    """Draw a scan, ink 0..1 (8, 8), as a 64x64 RGB image: white ink on black, bicubic."""
    levels = np.rint(grey * 255).astype(np.uint8)
    small = Image.fromarray(levels)
    return small.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC).convert("RGB")


def scan_of(image: Image.Image) -> NDArray[np.float64]:
    """Approximate inverse of `draw`, for an image of any size: ink 0..1 (8, 8)."""
    # The box filter averages all pixels of a cell.
    small = image.convert("L").resize((SOURCE_SIZE, SOURCE_SIZE), Image.Resampling.BOX)
    return np.asarray(small, dtype=np.float64) / 255


def write_new_digits(dataset_base_path: Path) -> None:
    """Write the LoRA's data set, and the eights and nines of the held-out split as `held_out.csv`.

    The data set has every eight and nine of the training split, and `REHEARSED_PER_DIGIT` rows of
    each old digit. Files that already have the right content are left alone.
    """
    # `metadata.csv` is written last: a folder that has it is complete.
    unseen = load_scans(held_out=True)
    write_scans(unseen.where(np.isin(unseen.digit, NEW_DIGITS)), dataset_base_path, "held_out.csv")
    scans = load_scans()
    chosen = np.isin(scans.digit, NEW_DIGITS)
    for digit in OLD_DIGITS:
        # The first ones, not random ones: the data set must be the same on every machine.
        rows = np.flatnonzero(scans.digit == digit)
        chosen[rows[:REHEARSED_PER_DIGIT]] = True
    write_scans(scans.where(chosen), dataset_base_path)


def write_old_digits(dataset_base_path: Path) -> None:
    """Write the base model's data set: zero to seven of the training split.

    Files that already have the right content are left alone.
    """
    scans = load_scans()
    write_scans(scans.where(np.isin(scans.digit, OLD_DIGITS)), dataset_base_path)


def write_scans(scans: Scans, dataset_base_path: Path, name: str = "metadata.csv") -> None:
    """Write one PNG per scan into `images/`, then a table with this name (columns: image, prompt).

    The table is written last and renamed into place, so a folder with a table is complete.
    """
    (dataset_base_path / "images").mkdir(parents=True, exist_ok=True)
    rows = [
        (f"images/{DIGIT_NAMES[digit]}_{index:04d}.png", prompt_of(digit))
        for digit, index in zip(scans.digit.tolist(), scans.index.tolist(), strict=True)
    ]
    for (file, _), content in zip(rows, _png_files(scans), strict=True):
        _write_if_changed(dataset_base_path / file, content)
    _write_if_changed(dataset_base_path / name, _table(rows))


def _png_files(scans: Scans) -> Iterator[bytes]:
    for grey in scans.grey:
        buffer = io.BytesIO()
        draw(grey).save(buffer, format="PNG")
        yield buffer.getvalue()


def _table(rows: Sequence[tuple[str, str]]) -> bytes:
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(("image", "prompt"))
    writer.writerows(rows)
    return buffer.getvalue().encode()


def _write_if_changed(path: Path, content: bytes) -> None:
    """Replace the file at `path` atomically, unless it already has this content."""
    # A new modification time would make every check decode the file again.
    if path.is_file() and path.read_bytes() == content:
        return
    staged = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    staged.write_bytes(content)
    staged.replace(path)
