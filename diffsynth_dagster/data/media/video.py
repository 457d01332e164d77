"""Videos, from files to tensors. Frames are RGB of 8 bits; see `shown` for which are read."""

import math
from collections.abc import Sequence
from pathlib import Path

import torch
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
from diffsynth_dagster.data.media.shown import frame_count, open_clip
from diffsynth_dagster.facts import Facts, digest_file

_HELD = 2
"""Frames of a clip that are in memory at a time, by what they take, with those of the decoder."""


def video_facts(path: Path, pool: DecoderPool) -> Facts:
    """What a check of a video finds, every frame decoded.

    Returns:
        `digest`, and what `DecoderPool.decode` says, and for what Pillow reads its `colour_facts`; or
        `status` and `message`.
    """
    try:
        found = _animation_facts(path, pool)
        missing = cut_short(path)
    except IMAGE_ERRORS as error:
        return media_problem(error, "video")
    if missing is None and found is None:
        found = pool.decode(path)
    if missing is None and found is not None:
        missing = found.get("error")
    if missing is not None or found is None:
        why = " ".join(str(missing).split())[:300]
        return {"status": "unreadable", "message": f"not a readable video: {why}"}
    if found["frames"] < 1:
        return {"status": "unreadable", "message": "not a readable video: it has no frames"}
    rate = found["rate"]
    if rate is not None and not (math.isfinite(rate) and rate > 0):
        return {"status": "bad_frame_rate", "message": f"the frame rate is {rate}"}
    transfer = found.pop("transfer", None)
    if transfer is not None:
        why = f"its range is high ({transfer}), and models are trained on BT.709: convert the clip"
        return {"status": "high_range", "message": why}
    try:
        return {"digest": digest_file(path), **found}
    except OSError as error:
        return media_problem(error, "video")


def _animation_facts(path: Path, pool: DecoderPool) -> Facts | None:
    """Facts about a file that Pillow reads; None for any other. Raises one of `IMAGE_ERRORS`."""
    try:
        opened = open_image(path)
    except UnidentifiedImageError:
        return None
    with opened as image, DECODING.hold(image.width * image.height):
        image.load()
        colours = colour_facts(image)
        if frame_count(image) > 1:
            found = pool.decode(path, "animation")
            transparent = colours["transparent"] or found.get("transparent", False)
            return {**found, **colours, "transparent": transparent}
        width, height = as_rgb(image, Look(profile=False)).size
    still = {"frames": 1, "rate": None, "times": None, "decoder": "pillow"}
    return {"width": width, "height": height, **still, **colours}


def read_frames(path: Path, indices: Sequence[int]) -> list[Image.Image]:
    """Frames of a video in RGB, as they are shown.

    Args:
        indices: which ones, counted from 0, in rising order.

    Raises:
        OSError, ValueError, …: see `IMAGE_ERRORS`; the file is damaged or has fewer frames.
    """
    wanted = list(dict.fromkeys(indices))
    with open_clip(path, by_decord=False) as clip, DECODING.hold(clip.pixels * len(wanted)):
        found = [f.image.resize(f.size) for f in clip.frames(wanted)]
    if len(found) < len(wanted):
        raise OSError(f"{path}: it does not have {wanted[-1] + 1} frames")
    frames = dict(zip(wanted, found, strict=True))
    return [frames[index] for index in indices]


def load_sample_video(
    path: Path,
    target: tuple[int, int],
    frames: int,
    stride: float,
    shown: Sequence[int] | None = None,
    look: Look | None = None,
) -> torch.Tensor:
    """A video file at its trained size (width, height) and length. One that is shorter stands still
    after its last frame. Each frame is brought to its size as it is decoded.

    Args:
        frames, stride: which frames are taken; see `frame_indices`.
        shown: which frames are taken, where the stride does not say it.
        look: how the colours of an animation or a picture are read; None as `Look()` says.

    Returns:
        float32 (3, F, height, width) in [-1, 1].

    Raises:
        OSError, ValueError, …: see `IMAGE_ERRORS`; the file is damaged.
    """
    indices = list(frame_indices(frames, stride) if shown is None else shown[:frames])
    width, height = target
    in_order = shown is None and indices == list(range(frames))
    with (
        open_clip(path, in_order, look) as clip,
        DECODING.hold(_HELD * clip.pixels + frames * width * height),
    ):
        film = torch.empty(3, frames, height, width)
        wanted = list(dict.fromkeys(indices))
        filled = 0
        for index, frame in zip(wanted, clip.frames(wanted), strict=False):
            still = to_tensor(fit(frame.image, target, frame.size))
            times = indices.count(index)
            film[:, filled : filled + times] = still[:, None]
            filled += times
        if not filled:
            raise OSError(f"{path}: it has no frames")
        film[:, filled:] = film[:, filled - 1 : filled]
        return film
