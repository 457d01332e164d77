"""Read video files into tensors. Frames are RGB with 8 bits per channel; `shown` reads them."""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError

from diffsynth_dagster.data.geometry import frame_indices
from diffsynth_dagster.data.media.budget import DECODING
from diffsynth_dagster.data.media.clip_frames import Frame, frame_count, open_clip
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
from diffsynth_dagster.data.media.signature import SIDE, picture_signature
from diffsynth_dagster.facts import Facts, digest_file


def video_facts(path: Path, pool: DecoderPool) -> Facts:
    """Check a video by decoding every frame.

    Returns:
        `digest`, `signature` and the result of `DecoderPool.decode`, and `colour_facts` if Pillow
        reads the file; or `status` and `message`. The signature is that of the first frame, and of
        a video that of its first frame and one near its middle, side by side.
    """
    try:
        found = _animation_facts(path, pool)  # None if Pillow does not read it
        missing = cut_short(path)
    except IMAGE_ERRORS as error:
        return media_problem(error, "video")
    if missing is None and found is None:  # a file that is cut short need not be decoded
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
    if "small" in found:
        rows = np.frombuffer(bytes.fromhex(found.pop("small")), dtype=np.uint8)
        found["signature"] = picture_signature(Image.fromarray(rows.reshape(SIDE, -1)))
    try:
        return {"digest": digest_file(path), **found}
    except OSError as error:
        return media_problem(error, "video")


def _animation_facts(path: Path, pool: DecoderPool) -> Facts | None:
    """Facts about a file that Pillow reads; None for other files. Raises one of `IMAGE_ERRORS`."""
    try:
        opened = open_image(path)
    except UnidentifiedImageError:
        return None
    with opened as image, DECODING.hold(image.width * image.height):
        image.load()
        rgb = as_rgb(image, Look(profile=False))
        facts = {**colour_facts(image), "signature": picture_signature(rgb)}
        if frame_count(image) > 1:
            found = pool.decode(path, "animation")
            # The colours are those of the first frame; any frame may be transparent.
            transparent = facts["transparent"] or found.get("transparent", False)
            return {**found, **facts, "transparent": transparent}
    still = {"frames": 1, "rate": None, "times": None, "decoder": "pillow"}
    return {"width": rgb.width, "height": rgb.height, **still, **facts}


def read_frames(
    path: Path, indices: Sequence[int], most_side: int | None = None
) -> list[Image.Image]:
    """Read single frames of a video in RGB, at the size at which they are displayed.

    Args:
        indices: counted from 0, in ascending order; repeated indices are allowed.
        most_side: larger frames are scaled down to this many pixels on the longer side.

    Raises:
        OSError, ValueError, …: see `IMAGE_ERRORS`; the file is damaged or has fewer frames.
    """
    wanted = list(dict.fromkeys(indices))
    # Frames that are scaled down take little memory after that.
    whole = len(wanted) if most_side is None else 1
    with (
        open_clip(path, by_decord=False) as clip,
        DECODING.hold(clip.pixels * (clip.held + whole)),
    ):
        found = [f.image.resize(_no_larger(f.size, most_side)) for f in clip.frames(wanted)]
    if len(found) < len(wanted):
        raise OSError(f"{path}: it does not have {wanted[-1] + 1} frames")
    frames = dict(zip(wanted, found, strict=True))
    return [frames[index] for index in indices]


def _no_larger(size: tuple[int, int], most_side: int | None) -> tuple[int, int]:
    """A size (width, height) scaled down to sides of at most `most_side`, with its aspect ratio."""
    scale = 1.0 if most_side is None else min(1.0, most_side / max(size))
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def load_sample_video(
    path: Path,
    target: tuple[int, int],
    frames: int,
    stride: float,
    shown: Sequence[int] | None = None,
    look: Look | None = None,
) -> torch.Tensor:
    """Read a video file at its trained size (width, height) and length.

    If the file is shorter, its last frame is repeated. Each frame is resized as soon as it is
    decoded, so that whole frames do not pile up in memory.

    Args:
        frames, stride: which frames are taken; see `frame_indices`.
        shown: the indices of the frames instead, if the stride does not determine them.
        look: how the colours of an animation or a picture are read; None means `Look()`.

    Returns:
        float32 (3, F, height, width) in [-1, 1].

    Raises:
        OSError, ValueError, …: see `IMAGE_ERRORS`; the file is damaged.
    """
    indices = list(frame_indices(frames, stride) if shown is None else shown[:frames])
    width, height = target
    # The check leaves `shown` empty for the first n frames only if decord returns them correctly.
    in_order = shown is None and indices == list(range(frames))
    with (
        open_clip(path, in_order, look) as clip,
        DECODING.hold(clip.held * clip.pixels + frames * width * height),
    ):
        film = torch.empty(3, frames, height, width)

        def resized(frame: Frame) -> torch.Tensor:
            return to_tensor(fit(frame.image, target, frame.size))

        wanted = list(dict.fromkeys(indices))
        filled = 0
        # The variable of a loop over the frames would keep one in memory while the next is decoded;
        # `map` keeps none.
        for index, still in zip(wanted, map(resized, clip.frames(wanted)), strict=False):
            times = indices.count(index)  # a rate above that of the file repeats frames
            film[:, filled : filled + times] = still[:, None]
            filled += times
        if not filled:
            raise OSError(f"{path}: it has no frames")
        film[:, filled:] = film[:, filled - 1 : filled]
        return film
