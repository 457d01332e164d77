"""Signatures of pictures: pictures that look alike have signatures that are near each other.

A signature holds the coarse structure of a picture in grey: the `VALUES` lowest spatial frequencies
of its two-dimensional discrete cosine transform (DCT). The mean is left out and the length does not
count, so brightness and contrast do not matter; nor do the size, the format and the compression.
"""

import base64
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image

VALUES = 48
"""Numbers in a signature: each one byte."""
FLAT = ""
"""The signature of what has too little structure to be told apart, and of what is no picture."""
SIDE = 32
"""Pixels on a side of the small grey picture that a signature is computed from."""
_LARGEST = 127
_LEAST_CONTRAST = 2.0
"""Standard deviation, in grey levels of 255, below which a picture is flat."""
_MOST_IN_ONE = 0.9
"""Share of the squared values that a single one may have. A mere gradient has nearly all in one."""


def _frequencies() -> tuple[NDArray[np.float64], NDArray[np.intp], NDArray[np.float64]]:
    """The DCT as a matrix (9, SIDE), and which of the 9 x 9 results are taken, with their weights."""
    cosines = np.cos(np.pi * np.outer(np.arange(9), 2 * np.arange(SIDE) + 1) / (2 * SIDE))
    down, across = np.indices((9, 9))
    radius = np.hypot(down, across).ravel()
    taken = np.argsort(radius, kind="stable")[1 : VALUES + 1]  # without the mean
    # The DCT's norm; and higher frequencies, which tell alike pictures apart, count somewhat more.
    on_edge = ((down == 0) | (across == 0)).ravel()
    return cosines, taken, (np.sqrt(radius) / np.where(on_edge, np.sqrt(2), 1))[taken]


_COSINES, _TAKEN, _WEIGHTS = _frequencies()


def picture_signature(image: Image.Image) -> str:
    """The signature of an image of any mode and size; `FLAT` if it has too little structure."""
    # `reduce` averages blocks of pixels: large pictures take little time.
    small = image.reduce(max(1, min(image.size) // (2 * SIDE))).convert("L")
    return signature_of(np.asarray(small.resize((SIDE, SIDE), Image.Resampling.BILINEAR)))


def signature_of(grey: NDArray[np.uint8]) -> str:
    """The signature of a grey picture (SIDE, SIDE): base64 of `VALUES` signed bytes; or `FLAT`."""
    levels = grey.astype(np.float64)
    found = (_COSINES @ levels @ _COSINES.T).ravel()[_TAKEN] * _WEIGHTS
    largest = np.abs(found).max()
    if levels.std() < _LEAST_CONTRAST or largest**2 > _MOST_IN_ONE * (found**2).sum():
        return FLAT
    values = np.rint(found * (_LARGEST / largest)).astype(np.int8)
    return base64.b64encode(values.tobytes()).decode()


def vectors_of(signatures: Sequence[str]) -> NDArray[np.float32]:
    """Signatures, none of them `FLAT`, as vectors (N, VALUES) of length 1: their scalar product is 1
    for equal ones."""
    content = base64.b64decode("".join(signatures))  # 48 bytes are 64 letters without padding
    values = np.frombuffer(content, dtype=np.int8).reshape(-1, VALUES).astype(np.float32)
    return values / np.linalg.norm(values, axis=1, keepdims=True)
