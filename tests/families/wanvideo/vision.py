"""Pictures as the authors of Wan give them to CLIP, computed without torch's interpolation."""

from typing import Any

import numpy as np
import torch
from PIL import Image

SIDE = 224
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
SHARPNESS = -0.75
"""The `a` of Keys' cubic kernel (1981) in torch's `bicubic`."""


def _kernel(x: np.ndarray) -> np.ndarray:
    """Keys' cubic kernel."""
    a, x = SHARPNESS, np.abs(x)
    near = (a + 2) * x**3 - (a + 3) * x**2 + 1
    far = a * (x**3 - 5 * x**2 + 8 * x - 4)
    return np.where(x <= 1, near, np.where(x < 2, far, 0.0))


def _weights(length: int) -> np.ndarray:
    """How much each of `length` pixels counts in each of the 224: pixels have their centres at
    halves, four of them count, and beyond an edge stand copies of the last."""
    weights = np.zeros((SIDE, length))
    for out in range(SIDE):
        centre = (out + 0.5) * length / SIDE - 0.5
        for place in range(int(np.floor(centre)) - 1, int(np.floor(centre)) + 3):
            weights[out, min(max(place, 0), length - 1)] += _kernel(np.array(centre - place))
    return weights


def clip_pixels(picture: Image.Image) -> torch.Tensor:
    """Picture → (3, 224, 224), the whole of it as CLIP reads it."""
    pixels = np.asarray(picture.convert("RGB")).astype(np.float64) / 255
    height, width = pixels.shape[:2]
    square = _weights(height) @ pixels.transpose(2, 0, 1) @ _weights(width).T
    normal = (square - np.reshape(MEAN, (3, 1, 1))) / np.reshape(STD, (3, 1, 1))
    return torch.tensor(normal, dtype=torch.float32)


class AuthorsProcessor:
    """An image processor for diffusers' pipeline: see `clip_pixels`."""

    def __call__(self, images: Any, return_tensors: str) -> Any:
        pictures = images if isinstance(images, list) else [images]
        return Pixels(pixel_values=torch.stack([clip_pixels(each) for each in pictures]))


class Pixels(dict[str, torch.Tensor]):
    """What a processor gives the pipeline."""

    def to(self, device: Any) -> "Pixels":
        return Pixels({name: tensor.to(device) for name, tensor in self.items()})
