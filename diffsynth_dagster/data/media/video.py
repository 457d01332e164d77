"""Videos, from files to tensors.

Animations (GIF, WebP, APNG, AVIF) are read by Pillow, and a still image is a video of one frame;
everything else is read by decord. Frames are RGB of 8 bits.
"""

import math
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from av.video.stream import VideoStream
from PIL import Image, UnidentifiedImageError

from diffsynth_dagster.data.geometry import frame_indices
from diffsynth_dagster.data.media.budget import DECODING
from diffsynth_dagster.data.media.colour import Look, colour_facts
from diffsynth_dagster.data.media.containers import cut_short
from diffsynth_dagster.data.media.decoder_pool import DecoderPool
from diffsynth_dagster.data.media.image import (
    IMAGE_ERRORS,
    as_rgb,
    fit,
    media_problem,
    open_image,
    to_tensor,
)
from diffsynth_dagster.facts import Facts, digest_file

_ANIMATED = ("GIF", "WEBP", "PNG", "AVIF")
_DEFAULT_DURATION_MS = 100
"""Of a frame of an animation that gives none, as browsers show it."""


def video_facts(path: Path, pool: DecoderPool) -> Facts:
    """What a check of a video finds, every frame decoded.

    Returns:
        `digest`, `width`, `height`, `frames`, and `rate` in frames per second (None for a still
        image), and for what Pillow reads its `colour_facts`; or `status` and `message`.
    """
    try:
        found: Facts | None = _animation_facts(path)
        missing = cut_short(path)
    except IMAGE_ERRORS as error:
        return media_problem(error, "video")
    if missing is None and found is None:
        found = pool.decode(path)
        missing = found.get("error")
    if missing is not None or found is None:
        why = " ".join(str(missing).split())[:300]
        return {"status": "unreadable", "message": f"not a readable video: {why}"}
    if found["frames"] < 1:
        return {"status": "unreadable", "message": "not a readable video: it has no frames"}
    rate = found["rate"]
    if rate is not None and not (math.isfinite(rate) and rate > 0):
        return {"status": "bad_frame_rate", "message": f"the frame rate is {rate}"}
    try:
        return {"digest": digest_file(path), **found}
    except OSError as error:
        return media_problem(error, "video")


def _animation_facts(path: Path) -> Facts | None:
    """Facts about a file that Pillow reads; None for any other. Raises one of `IMAGE_ERRORS`."""
    try:
        opened = open_image(path)
    except UnidentifiedImageError:
        return None
    with opened as image, DECODING.hold(image.width * image.height):
        frames = _frame_count(image)
        duration_ms, colours = 0, Facts()
        for index in range(frames):
            image.seek(index)
            image.load()
            own = colour_facts(image)
            colours = {
                **own,
                "transparent": own["transparent"] or colours.get("transparent", False),
            }
            shown = image.info.get("duration", 0)
            duration_ms += shown if shown > 0 else _DEFAULT_DURATION_MS
        image.seek(0)
        size = as_rgb(image, Look(profile=False)).size
    rate = 1000 * frames / duration_ms if frames > 1 else None
    return {"width": size[0], "height": size[1], "frames": frames, "rate": rate, **colours}


def _frame_count(image: Image.Image) -> int:
    """Frames of an animation; 1 for any other image, also one of several pages."""
    return int(getattr(image, "n_frames", 1)) if image.format in _ANIMATED else 1


def read_frames(path: Path, indices: Sequence[int]) -> list[Image.Image]:
    """Frames of a video in RGB.

    Args:
        indices: which ones, counted from 0, in rising order.

    Raises:
        OSError, ValueError, …: see `IMAGE_ERRORS`; the file is damaged or has fewer frames.
    """
    with _decoded(path, indices) as frames:
        return frames


@contextmanager
def _decoded(
    path: Path, indices: Sequence[int], holds: bool = False, look: Look | None = None
) -> Generator[list[Image.Image]]:
    """What `read_frames` reads, counted in the budget `DECODING` while the block runs.

    Args:
        holds: whether the last frame stands for those that the file does not have.
        look: how the colours of an animation or a picture are read; None as `Look()` says.
    """
    try:
        opened = open_image(path)
    except UnidentifiedImageError:
        with _decoded_by_decord(path, indices, holds) as frames:
            yield [Image.fromarray(frame) for frame in frames]
        return
    if holds:
        indices = _held(indices, _frame_count(opened))
    chosen = dict.fromkeys(indices)
    with opened as image, DECODING.hold(image.width * image.height * len(chosen)):
        found: dict[int, Image.Image] = {}
        for index in chosen:
            if _frame_count(image) > 1:
                image.seek(index)
            found[index] = as_rgb(image, look or Look())
        yield [found[index] for index in indices]


def decode_frames(path: Path, indices: Sequence[int]) -> np.ndarray:
    """Frames of a file that decord reads, (F, H, W, 3) of 8 bits.

    Raises:
        OSError: it has fewer frames.
        RuntimeError, decord.DECORDError: it is damaged.
    """
    with _decoded_by_decord(path, indices) as frames:
        return frames


@contextmanager
def _decoded_by_decord(
    path: Path, indices: Sequence[int], holds: bool = False
) -> Generator[np.ndarray]:
    """What `decode_frames` reads, counted in the budget `DECODING` while the block runs."""
    import decord

    reader: Any = decord.VideoReader(str(path), ctx=decord.cpu(0))
    if holds:
        indices = _held(indices, len(reader))
    if indices and indices[-1] >= len(reader):
        raise OSError(f"{path}: has {len(reader)} frames, not {indices[-1] + 1}")
    with DECODING.hold(_frame_pixels(path) * len(indices)):
        yield reader.get_batch(list(indices)).asnumpy()


def _held(indices: Sequence[int], frames: int) -> list[int]:
    """The indices, with that of the last of so many frames in place of later ones."""
    return [min(index, frames - 1) for index in indices]


def _frame_pixels(path: Path) -> int:
    """Pixels of a frame of a video, by its header: decord tells them after it decoded one."""
    with av.open(str(path), options={"protocol_whitelist": "file"}) as container:
        stream = container.streams.best("video")
        return stream.width * stream.height if isinstance(stream, VideoStream) else 0


def load_sample_video(
    path: Path, target: tuple[int, int], frames: int, stride: float, look: Look | None = None
) -> torch.Tensor:
    """A video file at its trained size (width, height) and length. One that is shorter stands still
    after its last frame.

    Args:
        frames, stride: which frames are taken; see `frame_indices`.
        look: how the colours of an animation or a picture are read; None as `Look()` says.

    Returns:
        float32 (3, F, height, width) in [-1, 1].
    """
    with _decoded(path, frame_indices(frames, stride), True, look) as images:
        return torch.stack([to_tensor(fit(image, target)) for image in images], dim=1)
