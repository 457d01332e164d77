"""Damaged files are rejected, whole ones are not, and nothing crashes or hangs."""

import os
import random
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from media_support import (
    VIDEOS,
    animation_bytes,
    convert,
    image_bytes,
    picture,
    png_of,
    real_clip,
)
from PIL import Image

from diffsynth_dagster.data.media import decoder_pool
from diffsynth_dagster.data.media.containers import cut_short
from diffsynth_dagster.data.media.decoder_pool import DecoderPool
from diffsynth_dagster.data.media.image import image_facts, load_sample_image
from diffsynth_dagster.data.media.video import load_sample_video, read_frames, video_facts

IMAGES = {
    "x.png": image_bytes("PNG"),
    "x.jpg": image_bytes("JPEG", quality=95),
    "progressive.jpg": image_bytes("JPEG", progressive=True, quality=95),
    "x.webp": image_bytes("WEBP", quality=95),
    "lossless.webp": image_bytes("WEBP", lossless=True),
    "x.gif": image_bytes("GIF"),
    "animated.gif": animation_bytes("GIF", 4),
    "animated.webp": animation_bytes("WEBP", 4),
    "animated.png": animation_bytes("PNG", 4),
    "x.bmp": image_bytes("BMP"),
    "x.tiff": image_bytes("TIFF", compression="tiff_lzw"),
}


@pytest.fixture(scope="module")
def pool() -> Iterator[DecoderPool]:
    with DecoderPool(2) as videos:
        yield videos


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("videos")
    return {name: convert(folder / name, *options) for name, options in VIDEOS.items()}


@pytest.mark.parametrize("name", IMAGES)
def test_whole_images_pass_and_cut_ones_do_not(
    name: str, tmp_path: Path, pool: DecoderPool
) -> None:
    """Cut at every kilobyte, and at every byte of the last fifty."""
    data, path = IMAGES[name], tmp_path / name
    path.write_bytes(data)
    facts = image_facts(path)
    assert (facts["width"], facts["height"]) == (96, 80)
    assert video_facts(path, pool)["frames"] == (4 if "animated" in name else 1)
    for cut in sorted({*range(0, len(data), 1024), *range(len(data) - 50, len(data))}):
        path.write_bytes(data[:cut])
        assert image_facts(path)["status"] == "unreadable", cut
        if cut % 1024 == 0 or cut == len(data) - 1:
            assert video_facts(path, pool)["status"] == "unreadable", cut


def test_images_with_flipped_bits_are_judged(tmp_path: Path) -> None:
    """They may decode; they do not crash the check, and read as they were judged."""
    source = random.Random(0)
    for name, data in IMAGES.items():
        path = tmp_path / name
        for flips in (1, 1, 1, 10, 100):
            damaged = bytearray(data)
            for _ in range(flips):
                damaged[source.randrange(len(damaged))] ^= 1 << source.randrange(8)
            path.write_bytes(damaged)
            facts = image_facts(path)
            if "status" not in facts:
                assert load_sample_image(path, (16, 16)).shape == (3, 16, 16)


ODD: list[tuple[str, bytes, str]] = [
    ("empty.jpg", b"", "unreadable"),
    ("zeros.png", bytes(5000), "unreadable"),
    ("text.jpg", b"this is no image\n" * 100, "unreadable"),
    (
        "script.jpg",
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n",
        "unreadable",
    ),
    ("bomb.png", png_of(50_000, 50_000), "too_large"),
    ("large.png", png_of(10_000, 10_000), "too_large"),
    ("none.png", png_of(0, 5), "unreadable"),
    ("png.jpg", IMAGES["x.png"], "ok"),
    ("jpg.gif", IMAGES["x.jpg"], "ok"),
    ("trailing.png", IMAGES["x.png"] + b"more", "ok"),
    ("trailing.jpg", IMAGES["x.jpg"] + bytes(9), "ok"),
]


@pytest.mark.parametrize(("name", "data", "status"), ODD, ids=[name for name, _, _ in ODD])
@pytest.mark.parametrize("kind", ["image", "video"])
def test_odd_images(
    name: str, data: bytes, status: str, kind: str, tmp_path: Path, pool: DecoderPool
) -> None:
    path = tmp_path / name
    path.write_bytes(data)
    facts = image_facts(path) if kind == "image" else video_facts(path, pool)
    assert facts.get("status", "ok") == status
    assert status == "ok" or facts["message"]


def test_many_threads_find_the_same_bomb(tmp_path: Path) -> None:
    from concurrent.futures import ThreadPoolExecutor

    path = tmp_path / "large.png"
    path.write_bytes(png_of(10_000, 10_000))
    with ThreadPoolExecutor(8) as threads:
        found = list(threads.map(image_facts, [path] * 100))
    assert {facts.get("status") for facts in found} == {"too_large"}


@pytest.mark.parametrize("name", VIDEOS)
def test_whole_videos_pass_and_cut_ones_do_not(
    name: str, videos: dict[str, Path], tmp_path: Path, pool: DecoderPool
) -> None:
    whole = video_facts(videos[name], pool)
    frames = 40 if name == "x.webm" else 120
    assert (whole["width"], whole["height"], whole["frames"]) == (193, 144, frames)
    assert whole["rate"] == pytest.approx(29.97, abs=0.2)
    data, path = videos[name].read_bytes(), tmp_path / name
    cuts = {int(len(data) * part) for part in (0, 0.01, 0.1, 0.3, 0.5, 0.7, 0.9, 0.99)}
    for cut in sorted({*cuts, *range(len(data) - 5, len(data))}):
        path.write_bytes(data[:cut])
        assert video_facts(path, pool)["status"] == "unreadable", cut


def test_videos_cut_at_every_kilobyte_are_known_to_be(
    videos: dict[str, Path], tmp_path: Path
) -> None:
    """By their headers alone: no decoder is asked."""
    for name, source in videos.items():
        data, path = source.read_bytes(), tmp_path / name
        assert cut_short(source) is None
        for cut in range(1024, len(data), 1024):
            path.write_bytes(data[:cut])
            assert cut_short(path) is not None, (name, cut)


def test_damaged_videos_do_not_stop_the_next(
    videos: dict[str, Path], tmp_path: Path, pool: DecoderPool
) -> None:
    source = random.Random(0)
    for name in ("fast.mp4", "x.mkv", "x.avi"):
        data, path = videos[name].read_bytes(), tmp_path / name
        for flips in (1, 10, 100, 1000):
            damaged = bytearray(data)
            for _ in range(flips):
                damaged[source.randrange(len(damaged))] ^= 1 << source.randrange(8)
            path.write_bytes(damaged)
            facts = video_facts(path, pool)
            assert facts.get("status", "ok") in ("ok", "unreadable", "bad_frame_rate")
        path.write_bytes(data[: len(data) // 2] + bytes(len(data) // 2))
        video_facts(path, pool)
        assert video_facts(videos[name], pool)["frames"] == 120


@pytest.mark.skipif(sys.platform == "win32", reason="has no alarms")
@pytest.mark.parametrize(
    ("decoder", "why"),
    [
        ("import os\nos.kill(os.getpid(), 11)\n", "crashed"),
        ("import ctypes\nctypes.CDLL(None).sleep(1000)\n", "gave no sign of life"),
    ],
)
def test_a_decoder_that_crashes_or_hangs(
    decoder: str, why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In compiled code, where Python cannot interfere."""
    module = tmp_path / "decord.py"
    module.write_text(
        "cpu = lambda i: None\n"
        "def VideoReader(path, **more):\n" + "".join(f"    {x}\n" for x in decoder.splitlines())
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    with DecoderPool(1, patience_s=2) as pool:
        for _ in range(2):
            assert why in video_facts(real_clip(), pool)["message"]


def test_workers_end_with_their_pool() -> None:
    with DecoderPool(1) as pool:
        assert pool.decode(real_clip())["frames"] == 120
        worker = pool._idle.get()  # pyright: ignore[reportPrivateUsage]
        assert worker is not None
        pool._idle.put(worker)  # pyright: ignore[reportPrivateUsage]
    assert worker.poll() is not None
    assert decoder_pool.PATIENCE_S > 10


def test_frames_are_those_of_the_file(videos: dict[str, Path]) -> None:
    """Against what ffmpeg itself decodes; the indices repeat and skip."""
    import imageio_ffmpeg

    reader = imageio_ffmpeg.read_frames(str(videos["x.mp4"]))
    width, height = next(reader)["size"]
    raw = [np.frombuffer(next(reader), np.uint8).reshape(height, width, 3) for _ in range(60)]
    reader.close()
    indices = [0, 0, 1, 3, 3, 20, 59]
    frames = read_frames(videos["x.mp4"], indices)
    for index, frame in zip(indices, frames, strict=True):
        assert frame.size == (193, 144)  # its pixels are wider than high
        stored = Image.fromarray(raw[index]).resize((193, 144))
        assert np.abs(np.asarray(frame).astype(int) - np.asarray(stored)).mean() < 1.0


def test_videos_become_tensors(videos: dict[str, Path], tmp_path: Path) -> None:
    clip = load_sample_video(videos["x.mp4"], (64, 48), 5, 2.0)
    assert clip.shape == (3, 5, 48, 64)
    assert clip.dtype == torch.float32
    assert -1.0 <= float(clip.min()) < float(clip.max()) <= 1.0
    assert not torch.equal(clip[:, 0], clip[:, 4])
    for kind in ("GIF", "WEBP", "PNG"):
        path = tmp_path / f"x.{kind.lower()}"
        path.write_bytes(animation_bytes(kind, 3))
        moving = load_sample_video(path, (96, 80), 3, 1.0)
        assert moving.shape == (3, 3, 80, 96)
        first = load_sample_image(path, (96, 80))
        assert torch.equal(moving[:, 0], first)
        assert not torch.equal(moving[:, 1], first)
        if kind != "GIF":
            third = torch.from_numpy(np.array(picture(2))).permute(2, 0, 1) / 127.5 - 1
            assert torch.allclose(moving[:, 2], third, atol=1e-6)
    picture().save(tmp_path / "still.png")
    assert load_sample_video(tmp_path / "still.png", (96, 80), 1, 1.0).shape == (3, 1, 80, 96)
    with pytest.raises(OSError, match="does not have 121 frames"):
        read_frames(videos["x.mp4"], [120])


def test_rates_of_animations(tmp_path: Path, pool: DecoderPool) -> None:
    for kind, duration_ms, rate in (("GIF", 40, 25.0), ("WEBP", 125, 8.0), ("GIF", 0, 10.0)):
        path = tmp_path / "x"
        path.write_bytes(animation_bytes(kind, 3, duration_ms))
        assert video_facts(path, pool)["rate"] == pytest.approx(rate)
    (tmp_path / "one.gif").write_bytes(animation_bytes("GIF", 1))
    assert video_facts(tmp_path / "one.gif", pool)["rate"] is None


def test_pages_are_no_frames(tmp_path: Path, pool: DecoderPool) -> None:
    picture().save(tmp_path / "x.tiff", save_all=True, append_images=[Image.new("RGB", (9, 9))])
    assert video_facts(tmp_path / "x.tiff", pool)["frames"] == 1
