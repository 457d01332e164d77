"""Sampled clips: the files they become, and what the page of their asset plays."""

import base64
import io
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from conftest import Values, record_of, train_to_end
from families.ltx2.cases import CASES as LTX2
from families.ltx2.cases import FRAMES, SIDE, rows, write
from media_support import picture
from PIL import Image, ImageSequence

from assets.pictures import MAX_ANIMATION_BYTES, MAX_ANIMATION_FRAMES, animation
from diffsynth_dagster.errors import OutputError
from diffsynth_dagster.families.contract import Clip
from diffsynth_dagster.training import sample_pictures
from diffsynth_dagster.training.clips import read_frames, write_clip
from diffsynth_dagster.training.sampling import Sampler, grid, strip

COLORS = ((200, 40, 40), (40, 200, 40), (40, 40, 200), (255, 255, 255), (0, 0, 0))


def clip_of(frames: int, size: tuple[int, int], rate: float | None, **sound: Any) -> Clip:
    """Frames of one colour each."""
    return Clip([Image.new("RGB", size, COLORS[i % 5]) for i in range(frames)], rate, **sound)


def tone(seconds: float, rate: int, channels: int) -> torch.Tensor:
    times = torch.arange(round(seconds * rate)) / rate
    return torch.sin(2 * torch.pi * 440 * times).expand(channels, -1) / 2


def heard(path: Path) -> tuple[np.ndarray, int]:
    """The sound of a file (channels, samples), and its rate."""
    with av.open(str(path)) as container:
        stream = container.streams.audio[0]
        assert stream.codec_context.name == "aac"
        frames = [frame.to_ndarray() for frame in container.decode(stream)]
        return np.concatenate(frames, axis=1), stream.rate


@pytest.mark.parametrize(
    ("size", "rate", "read_rate"),
    [((64, 48), 16.0, 16.0), ((65, 47), None, 24.0), ((64, 48), 29.97, 29.97)],
)
def test_a_clip_becomes_a_video_that_players_read(
    tmp_path: Path, size: tuple[int, int], rate: float | None, read_rate: float
) -> None:
    path = write_clip(tmp_path / "clip.mp4", clip_of(9, size, rate))
    with av.open(str(path)) as container:
        (stream,) = container.streams
        assert isinstance(stream, av.VideoStream)
        assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
        assert float(stream.average_rate or 0) == pytest.approx(read_rate)
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
    assert len(frames) == 9
    for index, frame in enumerate(frames):
        assert frame.shape == (48, size[0] + size[0] % 2, 3)
        # Also where an odd side was made even.
        assert np.abs(frame.astype(int) - COLORS[index % 5]).max() <= 4


@pytest.mark.parametrize(
    ("channels", "rate", "written"), [(2, 24000, 24000), (1, 44100, 44100), (2, 12345, 48000)]
)
def test_its_sound_is_in_the_file(tmp_path: Path, channels: int, rate: int, written: int) -> None:
    sound = tone(1.5, rate, channels)
    clip = clip_of(36, (64, 48), 24.0, sound=sound, sound_rate=rate)
    samples, found = heard(write_clip(tmp_path / "clip.mp4", clip))
    assert found == written
    assert samples.shape[0] == channels
    # AAC fills its last blocks up with silence.
    assert 1.5 <= samples.shape[1] / written <= 1.5 + 3 * 1024 / written
    middle = samples[:, written // 4 : written // 4 + written]
    assert np.abs(middle).max() == pytest.approx(0.5, abs=0.05)
    loudest = np.abs(np.fft.rfft(middle, axis=1)).argmax(axis=1)
    assert loudest == pytest.approx(440, abs=2)


def test_sound_beyond_its_range_is_clamped(tmp_path: Path) -> None:
    loud = clip_of(24, (64, 48), 24.0, sound=tone(1.0, 16000, 1) * 8, sound_rate=16000)
    samples, _ = heard(write_clip(tmp_path / "clip.mp4", loud))
    assert np.abs(samples).max() < 1.5


@contextmanager
def files_up_to(size: int) -> Iterator[None]:
    """No file of this process grows beyond so many bytes, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("room", [100, 20_000])
def test_a_failed_write_leaves_the_file_of_before(tmp_path: Path, room: int) -> None:
    path = write_clip(tmp_path / "clip.mp4", clip_of(2, (64, 48), 24.0))
    before = path.read_bytes()
    noisy = Clip([picture(index) for index in range(30)], 24.0)
    with pytest.raises(OutputError, match="too large"), files_up_to(room):
        write_clip(path, noisy)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["clip.mp4"]


def test_frames_are_read_back(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "clip.mp4", clip_of(5, (64, 48), 12.0))
    clip = read_frames(path, most_width=32)
    assert (len(clip.frames), clip.frame_rate) == (5, 12.0)
    assert {frame.size for frame in clip.frames} == {(32, 24)}


def played(value: Any) -> Image.Image:
    text = str(value.value).removeprefix("![](data:image/webp;base64,").removesuffix(")")
    image = Image.open(io.BytesIO(base64.b64decode(text)))
    image.load()
    return image


def test_clips_play_side_by_side(tmp_path: Path) -> None:
    files = [write_clip(tmp_path / f"{n}.mp4", clip_of(n, (64, 48), 20.0)) for n in (9, 5)]
    shown = played(animation([*files, tmp_path / "removed.mp4"]))
    assert shown.size == (64 + 4 + 64, 48)
    frames = [frame.convert("RGB") for frame in ImageSequence.Iterator(shown)]
    assert len(frames) == 5
    assert shown.info["duration"] == 50
    assert shown.info["loop"] == 0
    for frame, color in zip(frames, COLORS, strict=True):
        assert np.abs(np.subtract(frame.getpixel((20, 20)), color)).max() <= 12
        assert np.abs(np.subtract(frame.getpixel((90, 20)), color)).max() <= 12
    assert animation([]) is None


def test_what_plays_is_small(tmp_path: Path) -> None:
    """Noise, which nothing compresses, in more frames than are shown."""
    source = np.random.default_rng(0)
    noise = source.integers(0, 255, (2 * MAX_ANIMATION_FRAMES, 96, 128, 3), dtype=np.uint8)
    clip = Clip([Image.fromarray(frame) for frame in noise], 24.0)
    value = animation([write_clip(tmp_path / "clip.mp4", clip)])
    assert value is not None
    assert len(str(value.value)) < MAX_ANIMATION_BYTES * 4 / 3 + 100
    shown = played(value)
    assert getattr(shown, "n_frames", 1) == MAX_ANIMATION_FRAMES
    assert shown.info["duration"] == round(2000 / 24)


def test_the_picture_of_images_is_what_it_was(
    values: Values, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All images of a step in a grid, and no video."""
    made: list[list[Image.Image]] = []

    class Listening(Sampler):
        def make(self, *arguments: Any) -> Iterator[tuple[int, Clip]]:
            made.append([])
            for number, clip in super().make(*arguments):
                made[-1] += clip.frames
                yield number, clip

    monkeypatch.setattr(sample_pictures, "Sampler", Listening)
    config = values(
        sample_prompts=["a", "another"], sample_num_inference_steps=2, height=32, width=48
    )
    run = train_to_end(config, tmp_path / "run")
    for step, images in zip((0, 2), made, strict=True):
        expected = tmp_path / "expected.png"
        grid(images, columns=2).save(expected)
        assert (run / "samples" / f"step-{step}.png").read_bytes() == expected.read_bytes()
        assert [strip([image]).tobytes() for image in images] == [i.tobytes() for i in images]
    assert {file.suffix for file in (run / "samples").iterdir()} == {".png"}
    record = record_of(run)
    assert record.clips == {}
    assert record.pictures == {"step-0": "step-0.png", "step-2": "step-2.png"}


def test_a_training_writes_clips_with_sound(tmp_path: Path) -> None:
    case = LTX2[0]
    write(tmp_path / "model")
    table = rows(tmp_path / "data")
    models = case.models(tmp_path / "model", "diffusers")
    vocoder = tmp_path / "model/diffusers/vocoder/diffusion_pytorch_model.safetensors"
    config = {
        "family": case.family,
        "dataset_base_path": str(table.parent),
        "dataset_metadata_path": str(table),
        "cache_path": str(tmp_path / "cache"),
        "lora_base_model": "dit",
        "lora_rank": 4,
        "sample_prompts": ["a clip", "another"],
        "sample_num_inference_steps": 2,
        **models,
        **case.parameters,
        "model_paths": [*models["model_paths"], str(vocoder)],
        "save_steps": 4,
    }
    run = train_to_end(config, tmp_path / "run")
    record = record_of(run)
    names = [f"step-{step}-{prompt}" for step in (0, 4) for prompt in (0, 1)]
    assert record.clips == {name: f"{name}.mp4" for name in names}
    sounds: list[np.ndarray] = []
    for name in names:
        path = run / "samples" / f"{name}.mp4"
        assert len(read_frames(path, SIDE).frames) == FRAMES
        samples, rate = heard(path)
        assert samples.shape[0] == 2
        assert samples.shape[1] / rate == pytest.approx(FRAMES / 24, abs=0.2)
        sounds.append(samples)
    assert not np.array_equal(sounds[0], sounds[1])
