"""Writes sampled clips as video files, with their sound, through PyAV (FFmpeg)."""

from fractions import Fraction
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import av
import numpy as np
from av.video.reformatter import ColorRange
from PIL import Image

from diffsynth_dagster.data.media.audio import LAYOUTS
from diffsynth_dagster.families.contract import Clip
from diffsynth_dagster.files import write_whole

FRAME_RATE = 24.0
"""Frames per second of a clip without a frame rate."""
FALLBACK_RATE = 48000
"""Samples per second that sound is resampled to if AAC does not support its own rate."""
_BT709 = 1
"""FFmpeg's number for BT.709; the same for matrix, primaries and transfer function."""


def write_clip(path: Path, clip: Clip) -> Path:
    """Write a clip as an mp4 file that browsers play: H.264 in yuv420p, with AAC if it has sound.

    yuv420p halves the resolution of colours and needs even sides: an odd side repeats its last row
    or column.

    Raises:
        OutputError: the folder cannot be written, or FFmpeg cannot encode the clip.
    """
    return write_whole(path, lambda staged: _encode(staged, clip))


def clip_bytes(clip: Clip) -> bytes:
    """The content of the file that `write_clip` writes. Raises `OutputError`."""
    # In a folder: FFmpeg moves the index to the front by reading the file that it has written.
    with TemporaryDirectory() as folder:
        return write_clip(Path(folder) / "clip.mp4", clip).read_bytes()


def read_frames(path: Path, most_width: int) -> Clip:
    """The frames of a video file, no wider than `most_width` pixels, without its sound.

    Raises:
        av.FFmpegError: the file is damaged.
    """
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        width = min(stream.width, most_width)
        height = max(1, round(stream.height * width / stream.width))
        frames = [f.to_image(width=width, height=height) for f in container.decode(stream)]
        return Clip(frames, float(stream.average_rate or FRAME_RATE))


def _encode(path: Path, clip: Clip) -> None:
    # 1001, for the NTSC rates: 29.97 is 30000/1001.
    rate = Fraction(clip.frame_rate or FRAME_RATE).limit_denominator(1001)
    width, height = clip.frames[0].size
    # The index comes first, so that a browser plays while it still loads.
    options = {"movflags": "+faststart"}
    try:
        with av.open(str(path), "w", format="mp4", options=options) as container:
            video: Any = container.add_stream("libx264", rate=rate, options={"crf": "18"})
            video.width, video.height = width + width % 2, height + height % 2
            video.pix_fmt = "yuv420p"
            _tag_colors(video.codec_context)
            # Streams are added before the first packet is written: the header lists them all.
            sound = None if clip.sound is None else _sound_stream(container, clip)
            for image in clip.frames:
                container.mux(video.encode(_frame(image)))
            container.mux(video.encode(None))  # flushes the encoder
            if sound is not None:
                container.mux(sound.encode(_sound_frame(clip)))
                container.mux(sound.encode(None))
    except av.FFmpegError as error:
        # Only some of FFmpeg's errors are an OSError, which `write_whole` explains.
        raise OSError(error.errno, f"FFmpeg: {error.strerror}") from error


def _tag_colors(codec: Any) -> None:
    """Tag the colour standard: players guess that of an untagged file from the size of its
    frames."""
    codec.colorspace = codec.color_primaries = codec.color_trc = _BT709
    codec.color_range = ColorRange.MPEG


def _frame(image: Image.Image) -> av.VideoFrame:
    pixels = np.asarray(image.convert("RGB"))
    height, width, _ = pixels.shape
    even = np.pad(pixels, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
    frame = av.VideoFrame.from_ndarray(even, "rgb24")
    return frame.reformat(format="yuv420p", dst_colorspace="ITU709", dst_color_range="MPEG")


def _sound_stream(container: Any, clip: Clip) -> Any:
    """An AAC stream at the clip's own rate if AAC supports it; otherwise PyAV resamples."""
    assert clip.sound is not None
    known = clip.sound_rate in (av.Codec("aac", "w").audio_rates or ())
    rate = clip.sound_rate if known else FALLBACK_RATE
    return container.add_stream("aac", rate=rate, layout=LAYOUTS[clip.sound.shape[0]])


def _sound_frame(clip: Clip) -> av.AudioFrame:
    assert clip.sound is not None
    samples = clip.sound.float().clamp(-1.0, 1.0).cpu().numpy()
    frame = av.AudioFrame.from_ndarray(
        np.ascontiguousarray(samples), "fltp", LAYOUTS[samples.shape[0]]
    )
    frame.sample_rate = clip.sound_rate
    return frame
