"""What decoders hide, and what they cost: damaged frames are told, and memory is bounded."""

import os
import random
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from threading import Lock

import numpy as np
import pytest
from conftest import Values, train_to_end
from media_support import VIDEOS, animation_bytes, convert, picture, real_clip
from PIL import Image, ImageOps

from diffsynth_dagster.data.media.budget import DECODING, PixelBudget
from diffsynth_dagster.data.media.decoder_pool import DecoderPool
from diffsynth_dagster.data.media.image import load_sample_image, read_image
from diffsynth_dagster.data.media.video import load_sample_video, video_facts

SOUND = {
    **VIDEOS,
    "slices.mp4": ("-c:v", "libx264", "-slices", "4", "-bf", "3"),
    "interlaced.mp4": ("-c:v", "libx264", "-flags", "+ilme+ildct"),
    "open.mp4": ("-c:v", "libx264", "-x264-params", "open-gop=1:keyint=20"),
    "hevc.mp4": ("-c:v", "libx265", "-x265-params", "log-level=error"),
    "x.mpg": ("-c:v", "mpeg2video"),
    "prores.mov": ("-c:v", "prores_ks"),
}


@pytest.fixture(scope="module")
def pool() -> Iterator[DecoderPool]:
    with DecoderPool(2) as videos:
        yield videos


def flipped(data: bytes, flips: int, source: random.Random) -> bytes:
    """The middle of a file, where its frames are, with so many bits flipped."""
    damaged = bytearray(data)
    for _ in range(flips):
        place = source.randrange(len(data) // 50, len(data) * 9 // 10)
        damaged[place] ^= 1 << source.randrange(8)
    return bytes(damaged)


@pytest.mark.parametrize("name", SOUND)
def test_sound_clips_pass(name: str, tmp_path: Path, pool: DecoderPool) -> None:
    path = convert(tmp_path / name, *SOUND[name])
    assert video_facts(path, pool)["frames"] == (40 if name == "x.webm" else 120)


def test_clips_cut_without_encoding_pass(tmp_path: Path, pool: DecoderPool) -> None:
    """Their first frames may refer to ones that were left out."""
    source = convert(tmp_path / "open.mp4", *SOUND["open.mp4"])
    for start in ("0.7", "1.33", "2.5"):
        cut = convert(tmp_path / "cut.mp4", "-c", "copy", before=("-ss", start), source=source)
        assert "status" not in video_facts(cut, pool), start


def test_flipped_bits_of_h264_are_found(tmp_path: Path, pool: DecoderPool) -> None:
    """Not every one: some codes turn into others that mean something."""
    source, path, data = random.Random(0), tmp_path / "x.mp4", real_clip().read_bytes()
    path.write_bytes(data)
    assert video_facts(path, pool)["frames"] == 120
    found = {1: 0, 10: 0}
    for flips in found:
        for _ in range(20):
            path.write_bytes(flipped(data, flips, source))
            facts = video_facts(path, pool)
            if "status" in facts:
                assert re.search(r"frame \d+ is damaged|not a readable", facts["message"])
                found[flips] += "is damaged" in facts["message"]
    assert found[1] >= 12
    assert found[10] >= 18


def as_once_converted(path: Path) -> np.ndarray:
    """16 bits → 8 in the way that takes the most memory."""
    with Image.open(path) as image:
        values = np.asarray(ImageOps.exif_transpose(image)).astype(np.int64)
    high = (values >> 8).clip(0, 255).astype(np.uint8)
    return np.stack([high] * 3, axis=2)


@pytest.mark.parametrize("dtype", ["uint16", ">u2"])
@pytest.mark.parametrize("orientation", [1, 6])
def test_deep_grey_keeps_its_high_bits(tmp_path: Path, dtype: str, orientation: int) -> None:
    """Bit for bit, in strips of any height."""
    limits = np.iinfo(np.dtype(dtype))
    low, high = max(limits.min, -(1 << 20)), min(limits.max, 1 << 20)
    for size in ((3, 5), (700, 1501), (1 << 20, 2)):
        values = np.random.default_rng(0).integers(low, high, size, endpoint=True)
        deep = Image.fromarray(values.astype(dtype))
        exif = deep.getexif()
        exif[0x0112] = orientation
        path = tmp_path / ("x.tiff" if dtype != "uint16" else "x.png")
        deep.save(path, exif=exif)
        assert np.array_equal(np.asarray(read_image(path)), as_once_converted(path))


PEAK = """
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from diffsynth_dagster.data.media.budget import DECODING
from diffsynth_dagster.data.media.image import image_facts

DECODING.megapixels = int(sys.argv[1])

def peak():  # not that of getrusage, which goes on from the process that started this one
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])

before = peak()
for count in (1, 6):
    with ThreadPoolExecutor(count) as threads:
        assert not any("status" in facts for facts in threads.map(image_facts, [Path(sys.argv[2])] * count))
    print(peak() - before)
"""


def peak_bytes(megapixels: int, path: Path) -> tuple[int, int]:
    """Memory that checking a picture takes at most, in a process of its own: once, and six times at
    once."""
    command = [sys.executable, "-c", PEAK, str(megapixels), str(path)]
    # What the C library keeps of what was freed is not counted: see docs/metadata.md.
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    one, six = subprocess.run(command, check=True, capture_output=True, env=env).stdout.split()
    return 1024 * int(one), 1024 * int(six)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.soak
def test_memory_goes_with_the_budget_and_not_with_the_threads(tmp_path: Path) -> None:
    """Twelve bytes a pixel at most."""
    side = 2000
    Image.fromarray(np.full((side, side), 40_000, np.uint16)).save(tmp_path / "deep.png")
    Image.new("RGB", (side, side), (9, 8, 7)).save(tmp_path / "x.png")
    for name in ("deep.png", "x.png"):
        one, six = peak_bytes(4, tmp_path / name)
        assert 3 * side**2 < one < 12 * side**2
        assert six < one + 3 * side**2, "less than one more picture"


def test_threads_share_the_budget() -> None:
    budget, lock, held, most = PixelBudget(10), Lock(), [0], [0]

    def decode(pixels: int) -> None:
        with budget.hold(pixels):
            with lock:
                held.append(held[-1] + pixels)
                most.append(max(most[-1], held[-1] if pixels <= 10e6 else 0))
                assert pixels <= 10e6 or held[-1] == pixels, "a larger one goes alone"
            time.sleep(0.001)
            with lock:
                held.append(held[-1] - pixels)

    source = random.Random(0)
    with ThreadPoolExecutor(16) as threads:
        sizes = [source.choice((1, 3, 7, 10, 30)) * 1_000_000 for _ in range(300)]
        list(threads.map(decode, sizes))
    assert held[-1] == 0
    assert 7e6 < max(most) <= 10e6


def test_what_fails_is_counted_no_longer(tmp_path: Path) -> None:
    picture().save(tmp_path / "x.png")
    data = (tmp_path / "x.png").read_bytes()
    (tmp_path / "half.png").write_bytes(data[: len(data) // 2])
    for _ in range(3):
        with pytest.raises(OSError, match="trunc"):
            read_image(tmp_path / "half.png")
    with DECODING.hold(DECODING.megapixels * 1_000_000):
        pass


def test_clips_count_with_all_their_frames(
    tmp_path: Path, pool: DecoderPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    held: list[int] = []
    hold = PixelBudget.hold

    def noted(budget: PixelBudget, pixels: int) -> AbstractContextManager[None]:
        held.append(pixels)
        return hold(budget, pixels)

    monkeypatch.setattr(PixelBudget, "hold", noted)
    load_sample_video(real_clip(), (32, 32), 5, 2.0)
    (tmp_path / "x.gif").write_bytes(animation_bytes("GIF", 4))
    load_sample_video(tmp_path / "x.gif", (32, 32), 3, 1.0)
    video_facts(tmp_path / "x.gif", pool)
    load_sample_image(tmp_path / "x.gif", (32, 32))
    frame = 96 * 80
    film = 32 * 32
    assert held == [176 * 144 * 2 + 5 * film, frame + 3 * film, frame, frame]


def test_the_parameter_is_the_budget(
    values: Values, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(DECODING, "megapixels", DECODING.megapixels)
    assert DECODING.megapixels == 200
    train_to_end(values(decode_megapixels=3), tmp_path / "a")
    assert DECODING.megapixels == 3
