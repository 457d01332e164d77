"""The demo's judge: it reads the digits on generated images and counts how many are right.

It is a support vector machine trained on real scans. These are drawn and shrunk like generated
images. It knows nothing of diffusion, so its verdict is independent of the loss.
"""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from diffsynth_dagster.demo.digits import (
    DIGIT_NAMES,
    IMAGE_SIZE,
    NEW_DIGITS,
    OLD_DIGITS,
    draw,
    load_scans,
    prompt_of,
    scan_of,
)
from diffsynth_dagster.training.sampling import Evaluation

SAMPLES_PER_DIGIT = 20
EVALUATION_SEED = 0
SHOWN_PER_DIGIT = 8
LABEL_WIDTH = 80  # this and the gap: pixels of the grid of samples
GAP = 4
MISREAD = (214, 39, 40)
"""RGB colour of the frame around a sample that was read as another digit."""


class Reader:
    """Tells which digit an image shows. Every instance gives the same answers.

    Raises:
        UserError: scikit-learn is not installed.
    """

    def __init__(self) -> None:
        scans = load_scans()
        from sklearn.svm import SVC

        svc: Any = SVC  # scikit-learn has no complete types
        self._machine: Any = svc(C=10.0, gamma=0.05)
        # Trained on enlarged scans, so that they lose the same detail as generated images.
        self._machine.fit(_features([draw(grey) for grey in scans.grey]), scans.digit)

    def read(self, images: Sequence[Image.Image]) -> NDArray[np.int64]:
        """Images of any size, white ink on black → digits, int64 of shape (N,)."""
        return np.asarray(self._machine.predict(_features(images)), dtype=np.int64)


def _features(images: Sequence[Image.Image]) -> NDArray[np.float64]:
    """Images → ink in 0..1, float64 of shape (N, 64)."""
    return np.stack([scan_of(image).reshape(-1) for image in images])


@cache
def reader() -> Reader:
    """The reader, trained once per process. Raises `UserError`: see `Reader`."""
    return Reader()


def held_out_accuracy() -> float:
    """Fraction of the held-out real scans that the reader reads right."""
    scans = load_scans(held_out=True)
    read = reader().read([draw(grey) for grey in scans.grey])
    return float(np.mean(read == scans.digit))


def concept_accuracy(generate: Callable[[Sequence[str], int], list[Image.Image]]) -> Evaluation:
    """How often a model draws the digit that it was asked for.

    Args:
        generate: (prompts, seed) → one image for each prompt.

    Returns:
        Metrics, each a fraction 0..1: `accuracy/eight_nine` (the concept that the demo's LoRA
        learns), `accuracy/zero_to_seven` (what the base model knew before) and one for each digit,
        such as `accuracy/zero`. The picture `digits` has a row of samples for each digit.

    Raises:
        UserError: scikit-learn is not installed.
    """
    judge = reader()
    digits = np.repeat(np.arange(len(DIGIT_NAMES)), SAMPLES_PER_DIGIT)
    # The same seed before and after the training: the samples start from the same noise.
    images = generate([prompt_of(digit) for digit in digits.tolist()], EVALUATION_SEED)
    assert len(images) == len(digits)
    right = (judge.read(images) == digits).reshape(len(DIGIT_NAMES), SAMPLES_PER_DIGIT)
    metrics = {
        "accuracy/eight_nine": float(right[list(NEW_DIGITS)].mean()),
        "accuracy/zero_to_seven": float(right[list(OLD_DIGITS)].mean()),
    }
    for digit, name in enumerate(DIGIT_NAMES):
        metrics[f"accuracy/{name}"] = float(right[digit].mean())
    return Evaluation(metrics, {"digits": digit_grid(images, right)})


def digit_grid(images: Sequence[Image.Image], right: NDArray[np.bool_]) -> Image.Image:
    """Draw a grid with one row per digit: its name and its first samples, with misread ones framed.

    Args:
        images: the samples, ordered by digit, the same number of each.
        right: whether each sample was read as its digit, bool (10, samples per digit).
    """
    samples = right.shape[1]
    shown = min(SHOWN_PER_DIGIT, samples)
    pitch = IMAGE_SIZE + GAP
    sheet = Image.new("RGB", (LABEL_WIDTH + shown * pitch, len(right) * pitch + GAP), "white")
    pen = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(size=18)
    for row, (name, row_right) in enumerate(zip(DIGIT_NAMES, right.tolist(), strict=True)):
        top = GAP + row * pitch
        pen.text((GAP * 2, top + IMAGE_SIZE // 2), name, fill="black", font=font, anchor="lm")
        for column in range(shown):
            left = LABEL_WIDTH + column * pitch
            tile = images[row * samples + column].resize((IMAGE_SIZE, IMAGE_SIZE))
            sheet.paste(tile, (left, top))
            if not row_right[column]:
                corners = (left - 2, top - 2, left + IMAGE_SIZE + 1, top + IMAGE_SIZE + 1)
                pen.rectangle(corners, outline=MISREAD, width=2)
    return sheet
