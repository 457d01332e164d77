"""What decoders hide, and what they cost: damaged frames are told, and memory is bounded."""

import random
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from media_support import VIDEOS, convert, real_clip

from diffsynth_dagster.data.media.decoder_pool import DecoderPool
from diffsynth_dagster.data.media.video import video_facts

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
